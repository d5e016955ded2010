// Cooperative threads: a stack each, and a switch that saves what a call must preserve.
#pragma once
#include "state.h"

#if defined(__SANITIZE_ADDRESS__)
#error "fibers do not tell AddressSanitizer about their stacks"
#endif

extern "C" void msl_switch(void** save, void* to);

#if defined(__x86_64__)
#include <xmmintrin.h>
asm(R"(
.text
.globl msl_switch
.hidden msl_switch
.type msl_switch,@function
msl_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
static void* first_frame(char* top, void (*entry)()) {
  void** frame = reinterpret_cast<void**>(top - 64);
  *--frame = nullptr;  // where `entry` would return to; keeps the stack aligned as after a call
  *--frame = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--frame = nullptr;
  return frame;
}
typedef unsigned FloatState;
static FloatState float_state() { return _mm_getcsr(); }
static void set_float_state(FloatState s) { _mm_setcsr(s); }
static FloatState flushing(FloatState s) { return s | 0x8040; }  // results and operands
#elif defined(__aarch64__)
asm(R"(
.text
.globl msl_switch
.hidden msl_switch
.type msl_switch,%function
msl_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");
static void* first_frame(char* top, void (*entry)()) {
  void** frame = reinterpret_cast<void**>(top - 64 - 160);
  memset(frame, 0, 160);
  frame[11] = reinterpret_cast<void*>(entry);  // x30
  return frame;
}
typedef uint64_t FloatState;
static FloatState float_state() {
  FloatState s;
  asm volatile("mrs %0, fpcr" : "=r"(s));
  return s;
}
static void set_float_state(FloatState s) { asm volatile("msr fpcr, %0" : : "r"(s)); }
static FloatState flushing(FloatState s) { return s | 1u << 24; }
#else
#error "the simulator has no fiber switch for this processor; add one to fibers.h"
#endif

static void* scheduler_stack_pointer;

static void suspend() { msl_switch(&fibers[current].stack_pointer, scheduler_stack_pointer); }

// Ends the dispatch; what the fibers had on their stacks is forgotten.
[[noreturn]] static void abort_dispatch() {
  aborted = true;
  suspend();
  __builtin_trap();
}
