// What translated Metal text sees of the runtime: one GPU thread's position, barriers, simdgroups.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace msl {

struct Size {
  uint32_t x, y, z;
};

struct Thread {  // one GPU thread; the names of Metal's attributes
  Size thread_position_in_grid, thread_position_in_threadgroup, threadgroup_position_in_grid;
  Size threads_per_threadgroup, threads_per_grid, threadgroups_per_grid;
  Size dispatch_threads_per_threadgroup;
  uint32_t thread_index_in_threadgroup, thread_index_in_simdgroup;
  uint32_t simdgroup_index_in_threadgroup, simdgroups_per_threadgroup, threads_per_simdgroup;
};

struct Kernel {
  const char* name;
  void (*entry)(void* const* arguments, const Thread& thread);
};

const int lanes = 32;
const int slot = 16;  // bytes that a lane can hand to its simdgroup

// Source position of a collective call; two lanes meet only if they meet at the same one.
struct Site {
  const char* call;
  const char* file;
  int line;
};

extern "C" {
const Thread& msl_thread();
// Publishes `size` bytes of every lane; returns 32 slots and which of them hold a value.
const unsigned char* msl_exchange(const void* value, unsigned size, Site site, uint32_t* present);
void msl_threadgroup_barrier(unsigned flags, Site site);
void msl_simdgroup_barrier(unsigned flags, Site site);
// Threadgroup memory of the variable `id`, the same for all threads of a group.
void* msl_threadgroup_memory(unsigned id, size_t size, size_t align, const char* name);
void msl_inactive_lane(Site site, unsigned lane);
float msl_noise(float x, float ulps);  // x itself unless the run asks for noise
unsigned msl_sum_order();              // 0 halves, 1 in turn, 2 neighbours
}

}  // namespace msl
