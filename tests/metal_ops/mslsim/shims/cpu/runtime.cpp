// Runs a grid: one threadgroup after another, every GPU thread of it on a fiber of its own.
#include <cmath>

#include "memory.h"

extern "C" float msl_noise(float x, float ulps) {
  if (!options.noise || !(std::fabs(x) < 3e38f) || x == 0) return x;
  const double ulp = double(std::nextafterf(x, INFINITY)) - double(x);
  const double share = double(random_bits() >> 11) / double(1ull << 52) - 1;  // of [-1, 1)
  return float(double(x) + share * ulps * ulp);
}
extern "C" unsigned msl_sum_order() { return unsigned(options.sum_order); }

static void fiber_main() {
  Fiber& f = fibers[current];
  dispatched->entry(arguments, f.thread);
  leave(f);
  suspend();
  __builtin_trap();  // nobody switches to a fiber that is done
}

static void run_group(std::vector<int>& order) {
  for (int finished = 0; finished < fiber_count;) {
    bool progress = false;
    if (options.order == 2)
      for (int i = fiber_count - 1; i > 0; --i)
        std::swap(order[i], order[random_bits() % uint64_t(i + 1)]);
    for (int i : order) {
      if (fibers[i].state != ready) continue;
      progress = true;
      current = i;
      ++switches;
      msl_switch(&scheduler_stack_pointer, fibers[i].stack_pointer);
      current = -1;
      if (aborted) return;
      finished += fibers[i].state == done;
    }
    if (progress || finished == fiber_count) continue;
    aborted = !unlock();
    if (aborted) return;
  }
}

// The grid of a dispatch, and its share that is group `index`.
struct Grid {
  msl::Size threads, size, groups;
  void prepare(uint64_t index) const;
};

static msl::Size unflatten(uint64_t i, msl::Size n) {
  return {uint32_t(i % n.x), uint32_t(i / n.x % n.y), uint32_t(i / n.x / n.y)};
}

void Grid::prepare(uint64_t index) const {
  const msl::Size at = unflatten(index, groups);
  const msl::Size origin = {at.x * size.x, at.y * size.y, at.z * size.z};
  // the last group of a dimension is smaller where the size does not divide the threads
  const msl::Size here = {std::min(size.x, threads.x - origin.x),
                          std::min(size.y, threads.y - origin.y),
                          std::min(size.z, threads.z - origin.z)};
  group = uint32_t(index);
  fiber_count = int(here.x * here.y * here.z);
  const uint32_t simd_count = uint32_t((fiber_count + msl::lanes - 1) / msl::lanes);
  variables.clear();
  arena_used = threadgroup_bytes = 0;
  epochs = Epochs();
  arrived = 0;
  for (uint32_t s = 0; s < simd_count; ++s) {
    simdgroups[s] = Simdgroup();
    memset(simdgroups[s].slots, 0xff, sizeof simdgroups[s].slots);
  }
  for (uint32_t i = 0; i < uint32_t(fiber_count); ++i) {
    Fiber& f = fibers[i];
    const msl::Size t = unflatten(i, here);
    f.state = ready;
    f.stack = stacks + stack_bytes * i;
    f.stack_pointer = first_frame(f.stack + stack_bytes, fiber_main);
    f.thread = {{origin.x + t.x, origin.y + t.y, origin.z + t.z}, t, at, here, threads, groups, size,
                i, i % msl::lanes, i / msl::lanes, simd_count, msl::lanes};
    Simdgroup& mine = simdgroups[i / msl::lanes];
    mine.all = mine.alive |= 1u << i % msl::lanes;
  }
}

static void start(const Buffer* given, int given_count) {
  random_state = (options.seed + 1) * 0x9e3779b97f4a7c15ull;
  reports_length = 0;
  reports[0] = 0;
  report_count = 0;
  reported.clear();
  aborted = false;
  switches = 0;
  buffer_count = given_count;
  arena_cells.resize(options.check ? arena_bytes : 0);
  for (int i = 0; i < given_count; ++i) {
    buffers[i] = given[i];
    counts[i] = Count();
    if (options.check && given[i].writable) cells[i].resize(given[i].size / given[i].element);
  }
}

// Counts what each buffer got, and reports elements of outputs that no thread has written.
static void finish() {
  for (int i = 0; i < buffer_count; ++i) {
    const Buffer& b = buffers[i];
    size_t unwritten = 0, first = 0;
    for (size_t j = 0; j < cells[i].size(); ++j) {
      const bool gap = b.pitch != 0 && j * b.element % b.pitch >= b.width;
      if (cells[i][j].written) counts[i].covered += b.element;
      else if (!gap && unwritten++ == 0) first = j;
    }
    if (options.complete && !aborted && unwritten != 0)
      report("unwritten", uintptr_t(i), "%zu elements of %s, the first at +%zu bytes", unwritten,
             b.name, first * b.element);
    cells[i] = {};  // many libraries live in one process
  }
}

// Runs `groups` (all if there are none) and returns how many reports there are in `text`.
extern "C" __attribute__((visibility("default"))) int msl_dispatch(
    const msl::Kernel* kernel, void* const* kernel_arguments, const Buffer* given, int given_count,
    const msl::Size* threads, const msl::Size* size, const uint32_t* groups, int group_count,
    const Options* run, char* stack_memory, const char** text, Count* each, uint64_t* totals) {
  dispatched = kernel;
  std::copy_n(kernel_arguments, given_count, arguments);
  options = *run;
  stacks = stack_memory;
  start(given, given_count);
  Grid grid = {*threads, *size, {}};
  grid.groups = {(threads->x - 1) / size->x + 1, (threads->y - 1) / size->y + 1,
                 (threads->z - 1) / size->z + 1};
  const uint64_t all = uint64_t(grid.groups.x) * grid.groups.y * grid.groups.z;
  const uint64_t count = group_count != 0 ? uint64_t(group_count) : all;
  const FloatState before = float_state();
  if (options.flush) set_float_state(flushing(before));
  std::vector<int> order;
  for (uint64_t i = 0; i < count && !aborted; ++i) {
    const uint64_t turn = options.order == 1 ? count - 1 - i : i;
    grid.prepare(group_count != 0 ? groups[turn] : turn);
    order.resize(fiber_count);
    for (int k = 0; k < fiber_count; ++k) order[k] = options.order == 1 ? fiber_count - 1 - k : k;
    run_group(order);
  }
  set_float_state(before);
  finish();
  for (int i = 0; i < buffer_count; ++i) each[i] = counts[i];
  totals[0] = switches;
  totals[1] = threadgroup_bytes;
  *text = reports;
  return report_count;
}
