// What one dispatch knows: its threads, simdgroups, buffers, and what was reported.
#pragma once
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <algorithm>
#include <vector>

#include "runtime.h"

// Both are filled in by Python; the fields are those of `library.py`, in this order.
struct Buffer {
  char* base;
  size_t size;     // bytes up to the end of the last element
  size_t element;  // bytes
  size_t pitch;    // from row to row, 0 if there are no gaps between rows
  size_t width;    // of a row, without its gap
  int writable;
  const char* name;
};
struct Options {
  int order;  // of threads and groups: 0 forward, 1 backward, 2 random
  uint64_t seed;
  int check, flush, noise, sum_order, strict, complete;
};
struct Count {
  uint64_t read, written, covered;  // bytes; the last counts an element once
};

enum State { ready, at_exchange, at_simdgroup_barrier, at_threadgroup_barrier, done };

struct Fiber {
  void* stack_pointer;
  char* stack;
  State state;
  msl::Site site;
  unsigned flags;
  msl::Thread thread;
};

// Epochs count the barriers passed, separately for the two kinds of memory they order.
struct Epochs {
  uint32_t threadgroup, device;
  void pass(unsigned flags) {
    device += flags & 1;
    threadgroup += flags >> 1 & 1;
  }
};

struct Simdgroup {
  uint32_t all, alive, arrived, at_barrier;  // lanes: alive ones have not returned
  unsigned generation;  // of the slots: a lane may publish before the others have read
  uint32_t present[2];
  alignas(16) unsigned char slots[2][msl::lanes * msl::slot];
  Epochs epochs;
};

// How many threads have read a cell since it was last written, as far as it matters.
enum Readers : uint8_t { one_thread, one_simdgroup, one_group, many_groups };

struct Cell {  // a buffer element or a threadgroup byte; groups are numbered from 1, 0 is nobody
  uint32_t write_group = 0, write_epoch = 0, write_simd_epoch = 0;
  uint32_t read_group = 0, read_epoch = 0, read_simd_epoch = 0;
  uint16_t write_thread = 0, read_thread = 0;
  Readers readers = one_thread;
  bool written = false;
};

struct Variable {  // in threadgroup memory
  unsigned id;
  size_t offset, size;
  const char* name;
};

static const int max_fibers = 1024, max_buffers = 31;
static const size_t stack_bytes = 128 << 10;  // as in library.py
static const size_t threadgroup_limit = 32 << 10, arena_bytes = 48 << 10;

static Options options;
static const msl::Kernel* dispatched;
static void* arguments[max_buffers];  // not the caller's: a checked kernel may read this library

static char* stacks;  // max_fibers of stack_bytes, the same for all libraries of a process
static Fiber fibers[max_fibers];
static Simdgroup simdgroups[max_fibers / msl::lanes];
static int fiber_count, current = -1, arrived;  // current: -1 in the scheduler
static uint32_t group;
static Epochs epochs;
static bool aborted;
static uint64_t switches, random_state;

static Buffer buffers[max_buffers];
static Count counts[max_buffers];
static std::vector<Cell> cells[max_buffers];
static int buffer_count;

alignas(64) static char arena[arena_bytes];  // threadgroup memory of the running group
static std::vector<Cell> arena_cells;
static std::vector<Variable> variables;
static size_t arena_used, threadgroup_bytes;

static char reports[1 << 15];
static size_t reports_length;
static int report_count;
struct Reported {
  const char* kind;
  uintptr_t where;
};
static std::vector<Reported> reported;

static uint64_t random_bits() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state;
}

// One line for each kind and place, which is a line of text or a return address.
__attribute__((format(printf, 3, 4))) static void report(const char* kind, uintptr_t where,
                                                         const char* format, ...) {
  ++report_count;
  for (const Reported& r : reported)
    if (r.kind == kind && r.where == where) return;
  reported.push_back({kind, where});
  char text[600];
  va_list values;
  va_start(values, format);
  vsnprintf(text, sizeof text, format, values);
  va_end(values);
  size_t room = sizeof reports - reports_length;
  char who[32] = "";
  if (current >= 0)
    snprintf(who, sizeof who, " thread %u", fibers[current].thread.thread_index_in_threadgroup);
  int n = snprintf(reports + reports_length, room, "%s: %s [group %u%s]\n", kind, text, group, who);
  reports_length += std::min<size_t>(n, room - 1);
}
