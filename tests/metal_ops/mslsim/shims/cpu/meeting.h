// Simdgroup exchanges and barriers: who waits for whom, and reports of those that never come.
#pragma once
#include "fibers.h"

static Simdgroup& simdgroup_of(const Fiber& f) {
  return simdgroups[f.thread.simdgroup_index_in_threadgroup];
}

static bool same(const msl::Site& a, const msl::Site& b) {
  return a.line == b.line && !strcmp(a.call, b.call) && !strcmp(a.file, b.file);
}

static void release_exchange(int index) {
  Simdgroup& s = simdgroups[index];
  const msl::Site* first = nullptr;
  for (int lane = 0; lane < msl::lanes; ++lane) {
    if (!(s.arrived >> lane & 1)) continue;
    Fiber& f = fibers[index * msl::lanes + lane];
    f.state = ready;
    if (first == nullptr) first = &f.site;
    if (!same(*first, f.site))
      report("simd-divergence", first->line,
             "lanes of simdgroup %d meet at different calls: %s at %s:%d and %s at %s:%d", index,
             first->call, first->file, first->line, f.site.call, f.site.file, f.site.line);
  }
  if (options.strict && s.arrived != s.all)
    report("simd-divergence", first->line, "only lanes %08x of simdgroup %d reach %s at %s:%d",
           s.arrived, index, first->call, first->file, first->line);
  s.present[s.generation++ & 1] = s.arrived;
  s.arrived = 0;
}

static void release_threadgroup_barrier() {
  const Fiber* first = nullptr;
  unsigned flags = ~0u;
  for (int i = 0; i < fiber_count; ++i) {
    Fiber& f = fibers[i];
    if (f.state != at_threadgroup_barrier) continue;
    f.state = ready;
    flags &= f.flags;
    if (first == nullptr) first = &f;
    if (!same(first->site, f.site))
      report("barrier-divergence", first->site.line,
             "threads %d and %d wait at different barriers: %s:%d and %s:%d",
             int(first - fibers), i, first->site.file, first->site.line, f.site.file, f.site.line);
  }
  arrived = 0;
  epochs.pass(flags);
}

static void wait_at(State state, msl::Site site, unsigned flags) {
  Fiber& f = fibers[current];
  f.state = state;
  f.site = site;
  f.flags = flags;
}

extern "C" const msl::Thread& msl_thread() { return fibers[current].thread; }
extern "C" const unsigned char* msl_exchange(const void* value, unsigned size, msl::Site site,
                                             uint32_t* present) {
  Fiber& f = fibers[current];
  Simdgroup& s = simdgroup_of(f);
  const unsigned lane = f.thread.thread_index_in_simdgroup, half = s.generation & 1;
  memcpy(s.slots[half] + msl::slot * lane, value, size);
  wait_at(at_exchange, site, 0);
  s.arrived |= 1u << lane;
  if (s.arrived == s.alive)
    release_exchange(f.thread.simdgroup_index_in_threadgroup);
  else
    suspend();
  *present = s.present[half];
  return s.slots[half];
}
extern "C" void msl_simdgroup_barrier(unsigned flags, msl::Site site) {
  Fiber& f = fibers[current];
  Simdgroup& s = simdgroup_of(f);
  wait_at(at_simdgroup_barrier, site, flags);
  s.at_barrier |= 1u << f.thread.thread_index_in_simdgroup;
  if (s.at_barrier != s.alive) return suspend();
  for (int lane = 0; lane < msl::lanes; ++lane)
    if (s.at_barrier >> lane & 1)
      fibers[f.thread.simdgroup_index_in_threadgroup * msl::lanes + lane].state = ready;
  s.at_barrier = 0;
  s.epochs.pass(flags);
}
extern "C" void msl_threadgroup_barrier(unsigned flags, msl::Site site) {
  wait_at(at_threadgroup_barrier, site, flags);
  if (++arrived == fiber_count)
    release_threadgroup_barrier();
  else
    suspend();
}
extern "C" void msl_inactive_lane(msl::Site site, unsigned lane) {
  report("inactive-lane", site.line, "%s at %s:%d reads lane %u, which takes no part in it",
         site.call, site.file, site.line, lane);
}

// A lane returned: the others of its simdgroup may be waiting for nobody else.
static void leave(Fiber& f) {
  Simdgroup& s = simdgroup_of(f);
  f.state = done;
  s.alive &= ~(1u << f.thread.thread_index_in_simdgroup);
  if (s.arrived != 0 && s.arrived == s.alive)
    release_exchange(f.thread.simdgroup_index_in_threadgroup);
}

// Nobody can run. Lets the lanes that did meet go on, if there are some; whether it could.
static bool unlock() {
  int at_barrier = 0, at_simd_barrier = 0, returned = 0;
  const msl::Site* site = nullptr;
  bool released = false;
  for (int i = 0; i < fiber_count; ++i) {
    const State state = fibers[i].state;
    returned += state == done;
    at_barrier += state == at_threadgroup_barrier;
    at_simd_barrier += state == at_simdgroup_barrier;
    if (state == at_threadgroup_barrier || state == at_simdgroup_barrier) site = &fibers[i].site;
  }
  for (int i = 0; i * msl::lanes < fiber_count; ++i) {
    if (simdgroups[i].arrived == 0) continue;
    release_exchange(i);
    released = true;
  }
  if (released) return true;
  report("barrier-divergence", site->line,
         "%d of %d threads wait at %s at %s:%d, %d have returned, %d wait elsewhere",
         at_barrier + at_simd_barrier, fiber_count, site->call, site->file, site->line, returned,
         fiber_count - at_barrier - at_simd_barrier - returned);
  return false;
}
