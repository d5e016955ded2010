// The checker: every load and store of a kernel, through the hooks that -fsanitize=thread and
// -fsanitize=undefined call. Only their calls are used, not their libraries.
#pragma once
#include "meeting.h"

extern "C" const char __ehdr_start[] __attribute__((visibility("hidden")));  // this library
extern "C" const char _end[] __attribute__((visibility("hidden")));

// A place in the library, which Python replaces by its line.
#define MSL_PC "@%#zx"
static size_t offset_of(const void* pc) { return size_t(static_cast<const char*>(pc) - __ehdr_start); }
static uintptr_t place(const void* pc) { return reinterpret_cast<uintptr_t>(pc); }

struct Access {
  char* address;
  size_t size;
  bool write;
  const void* pc;
  const char* verb() const { return write ? "write" : "read"; }
};

static void report_race(const char* how, const char* name, size_t offset, unsigned thread,
                        unsigned other_group, const void* pc) {
  report("race", place(pc), "%s of %s+%zu bytes, of thread %u in group %u, no barrier between, " MSL_PC,
         how, name, offset, thread, other_group - 1, offset_of(pc));
}

// The thread that looks at a cell, and when.
struct Now {
  uint32_t group, epoch, simd_epoch;
  uint16_t thread;
};

// Whether `thread` did something in this epoch that nothing has ordered before now.
static bool unordered(const Now& now, uint32_t epoch, uint32_t simd_epoch, uint16_t thread) {
  if (epoch != now.epoch || thread == now.thread) return false;
  return thread / msl::lanes != now.thread / msl::lanes || simd_epoch == now.simd_epoch;
}

static bool races_with_reads(const Cell& c, const Now& now) {
  if (c.read_group == 0) return false;
  if (c.readers == many_groups || c.read_group != now.group) return true;
  if (c.read_epoch != now.epoch) return false;
  if (c.readers == one_group) return true;
  const bool alone = c.readers == one_thread || c.read_thread / msl::lanes != now.thread / msl::lanes;
  if (alone) return unordered(now, c.read_epoch, c.read_simd_epoch, c.read_thread);
  return c.read_simd_epoch == now.simd_epoch;
}

static void note_read(Cell& c, const Now& now) {
  const bool ordered = c.read_group == now.group && c.read_epoch != now.epoch;
  if (c.read_group != 0 && (c.readers == many_groups || c.read_group != now.group)) {
    c.readers = many_groups;
    return;
  }
  if (c.read_group != 0 && !ordered) {
    if (c.readers == one_group) return;
    if (c.read_thread / msl::lanes != now.thread / msl::lanes) {
      c.readers = one_group;
      return;
    }
    if (c.read_simd_epoch == now.simd_epoch) {
      if (c.read_thread != now.thread) c.readers = one_simdgroup;
      return;
    }
  }
  c.read_group = now.group;
  c.read_epoch = now.epoch;
  c.read_simd_epoch = now.simd_epoch;
  c.read_thread = now.thread;
  c.readers = one_thread;
}

static void touch(Cell& c, const Now& now, const Access& a, const char* name, size_t offset) {
  const bool elsewhere = c.write_group != 0 && c.write_group != now.group;
  if (elsewhere || (c.write_group != 0 &&
                    unordered(now, c.write_epoch, c.write_simd_epoch, c.write_thread))) {
    report_race(a.write ? "write after a write" : "read after a write", name, offset,
                c.write_thread, c.write_group, a.pc);
  }
  if (!a.write) return note_read(c, now);
  if (races_with_reads(c, now))
    report_race("write after a read", name, offset, c.read_thread, c.read_group, a.pc);
  c.write_group = now.group;
  c.write_epoch = now.epoch;
  c.write_simd_epoch = now.simd_epoch;
  c.write_thread = now.thread;
  c.read_group = 0;  // ordered before this write, or reported
  c.readers = one_thread;
  c.written = true;
}

static Now now_in(const Epochs& all, const Epochs& simd, uint32_t Epochs::* kind) {
  const msl::Thread& t = fibers[current].thread;
  return {group + 1, all.*kind, simd.*kind, uint16_t(t.thread_index_in_threadgroup)};
}

[[noreturn]] static void out_of_bounds(const Access& a, const char* name, long offset) {
  report("out-of-bounds", place(a.pc), "%s of %zu bytes at %s%+ld bytes, " MSL_PC, a.verb(), a.size,
         name, offset, offset_of(a.pc));
  abort_dispatch();
}

static void in_threadgroup(const Access& a) {
  const size_t at = size_t(a.address - arena);
  const Now now = now_in(epochs, simdgroup_of(fibers[current]).epochs, &Epochs::threadgroup);
  const Variable* nearest = nullptr;
  for (const Variable& v : variables) {
    if (at + a.size + 64 > v.offset) nearest = &v;  // in order of their offsets
    if (at < v.offset || at + a.size > v.offset + v.size) continue;
    bool written = true;
    for (size_t i = at; i < at + a.size; ++i) {
      written &= arena_cells[i].written;
      touch(arena_cells[i], now, a, v.name, i - v.offset);
    }
    if (!a.write && !written)
      report("uninitialised", place(a.pc), "read of threadgroup memory never written: %s+%zu bytes, "
             MSL_PC, v.name, at - v.offset, offset_of(a.pc));
    return;
  }
  out_of_bounds(a, nearest == nullptr ? "threadgroup memory" : nearest->name,
                long(at) - long(nearest == nullptr ? 0 : nearest->offset));
}

static void in_buffer(int index, const Access& a) {
  const Buffer& b = buffers[index];
  const size_t at = size_t(a.address - b.base);
  if (at + a.size > b.size) out_of_bounds(a, b.name, long(at));
  if (b.pitch != 0 && at % b.pitch + a.size > b.width) {
    report("out-of-bounds", place(a.pc), "%s of %zu bytes at %s row %zu, byte %zu of %zu, " MSL_PC,
           a.verb(), a.size, b.name, at / b.pitch, at % b.pitch, b.width, offset_of(a.pc));
    abort_dispatch();
  }
  if (a.write && !b.writable) {
    report("const-write", place(a.pc), "write to the constant %s, " MSL_PC, b.name, offset_of(a.pc));
    abort_dispatch();
  }
  (a.write ? counts[index].written : counts[index].read) += a.size;
  if (!b.writable) return;
  const Now now = now_in(epochs, simdgroup_of(fibers[current]).epochs, &Epochs::device);
  const int shift = __builtin_ctzll(b.element);
  for (size_t i = at; i < at + a.size; i += b.element)
    touch(cells[index][i >> shift], now, a, b.name, i);
}

static inline void access(const Access& a) {
  if (current < 0) return;
  const Fiber& f = fibers[current];
  if (a.address >= f.stack && a.address + a.size <= f.stack + stack_bytes) return;
  if (a.address >= arena && a.address < arena + arena_bytes) return in_threadgroup(a);
  for (int i = 0; i < buffer_count; ++i)
    if (a.address >= buffers[i].base && a.address < buffers[i].base + buffers[i].size)
      return in_buffer(i, a);
  // constants of the text, and what the runtime returns references to
  if (!a.write && a.address >= __ehdr_start && a.address < _end) return;
  const Buffer* nearest = &buffers[0];
  size_t least = ~size_t(0);
  for (int i = 0; i < buffer_count; ++i) {
    const Buffer& b = buffers[i];
    const size_t away = a.address < b.base ? b.base - a.address : a.address - (b.base + b.size);
    if (away >= least) continue;
    least = away;
    nearest = &b;
  }
  out_of_bounds(a, nearest->name, long(a.address - nearest->base));
}

extern "C" void* msl_threadgroup_memory(unsigned id, size_t size, size_t align, const char* name) {
  for (const Variable& v : variables)
    if (v.id == id) return arena + v.offset;
  const size_t red_zone = 64, offset = (arena_used + red_zone + align - 1) / align * align;
  variables.push_back({id, offset, size, name});
  arena_used = offset + size;
  threadgroup_bytes += (size + 15) / 16 * 16;
  if (threadgroup_bytes > threadgroup_limit || arena_used > arena_bytes) {
    report("threadgroup-memory", id, "%zu bytes of threadgroup memory with %s, limit %zu",
           threadgroup_bytes, name, threadgroup_limit);
    abort_dispatch();
  }
  for (size_t i = 0; i < size; ++i) {
    const uint32_t nan = 0x7fa00bad;  // what an unwritten float reads as
    arena[offset + i] = char(nan >> 8 * (i % 4));
    if (options.check) arena_cells[offset + i] = Cell();
  }
  return arena + offset;
}

#define MSL_PC_HERE __builtin_return_address(0)
#define MSL_HOOK(n)                                                                  \
  void __tsan_read##n(char* p) { access({p, n, false, MSL_PC_HERE}); }               \
  void __tsan_write##n(char* p) { access({p, n, true, MSL_PC_HERE}); }               \
  void __tsan_unaligned_read##n(char* p) { access({p, n, false, MSL_PC_HERE}); }     \
  void __tsan_unaligned_write##n(char* p) { access({p, n, true, MSL_PC_HERE}); }     \
  void __tsan_read_write##n(char* p) {                                               \
    access({p, n, false, MSL_PC_HERE});                                              \
    access({p, n, true, MSL_PC_HERE});                                               \
  }
#define MSL_UNDEFINED(name, what)                                                               \
  void __ubsan_handle_##name(const void*, size_t, size_t) {                                     \
    report("undefined", place(MSL_PC_HERE), what ", " MSL_PC, offset_of(MSL_PC_HERE));          \
  }
extern "C" {
void __ubsan_handle_type_mismatch_v1(const void*, const char* p) {
  report("misaligned", place(MSL_PC_HERE), "access at %p, which its type does not allow, " MSL_PC,
         static_cast<const void*>(p), offset_of(MSL_PC_HERE));
  abort_dispatch();  // the processor may fault
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
MSL_HOOK(1) MSL_HOOK(2) MSL_HOOK(4) MSL_HOOK(8) MSL_HOOK(16)
void __tsan_read_range(char* p, size_t n) { access({p, n, false, MSL_PC_HERE}); }
void __tsan_write_range(char* p, size_t n) { access({p, n, true, MSL_PC_HERE}); }
static void* copy(void* to, const void* from, size_t n, const void* pc) {
  access({static_cast<char*>(const_cast<void*>(from)), n, false, pc});
  access({static_cast<char*>(to), n, true, pc});
  return memmove(to, from, n);
}
void* __tsan_memcpy(void* to, const void* from, size_t n) { return copy(to, from, n, MSL_PC_HERE); }
void* __tsan_memmove(void* to, const void* from, size_t n) { return copy(to, from, n, MSL_PC_HERE); }
void* __tsan_memset(void* to, int value, size_t n) {
  access({static_cast<char*>(to), n, true, MSL_PC_HERE});
  return memset(to, value, n);
}
MSL_UNDEFINED(out_of_bounds, "index outside of an array")
MSL_UNDEFINED(add_overflow, "signed overflow of +")
MSL_UNDEFINED(sub_overflow, "signed overflow of -")
MSL_UNDEFINED(mul_overflow, "signed overflow of *")
MSL_UNDEFINED(negate_overflow, "signed overflow of -")
MSL_UNDEFINED(divrem_overflow, "integer division by zero, or overflow")
MSL_UNDEFINED(shift_out_of_bounds, "shift by more than the width, or of a negative number")
MSL_UNDEFINED(float_cast_overflow, "conversion of a float to an integer that cannot hold it")
}
