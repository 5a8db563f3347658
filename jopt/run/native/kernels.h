// The kernels for one instruction set: what the compiler was told to compile for decides which.
#pragma once

#include "common.h"

#if defined(__AVX2__) && defined(__FMA__) && !defined(JOPT_PORTABLE)
#include <immintrin.h>
#if defined(__AVX512VNNI__) && defined(__AVX512VL__) && defined(__AVX512BW__)
#define JOPT_VNNI
#if defined(__AVX512VBMI__) && defined(__AVX512F__)
#define JOPT_VBMI
#endif
#endif
#include "simd_avx2.h"
#elif defined(__aarch64__) && defined(__ARM_NEON) && !defined(JOPT_PORTABLE)
#include <arm_neon.h>
#define JOPT_NEON
#include "simd_neon.h"
#else
#include "simd_portable.h"
#endif

#include "wide.h"
#include "quantize.h"
#include "panels.h"
#include "int8.h"
#include "int4.h"
#include "codebook.h"
#include "binary.h"
#include "sparse.h"
#include "depthwise.h"

namespace jopt {

#if defined(JOPT_VBMI)
constexpr const char* kInstructions = "AVX-512 VNNI and VBMI";
#elif defined(JOPT_VNNI)
constexpr const char* kInstructions = "AVX-512 VNNI";
#elif defined(__AVX2__) && defined(__FMA__) && !defined(JOPT_PORTABLE)
constexpr const char* kInstructions = "AVX2";
#elif defined(JOPT_NEON) && defined(__ARM_FEATURE_DOTPROD)
constexpr const char* kInstructions = "NEON with dot products";
#elif defined(JOPT_NEON)
constexpr const char* kInstructions = "NEON";
#else
constexpr const char* kInstructions = "portable";
#endif

}  // namespace jopt
