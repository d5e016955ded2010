// Metal Shading Language for a host compiler: what the translated text includes.
#pragma once
#include "msl_simd.h"

// The translator has turned threadgroup variables into references; elsewhere the address spaces
// only qualify pointers and references.
#define device
#define thread
#define threadgroup
#define constant const
#define kernel
