// What CUDA kernels find around them, on a CPU. Every thread of a block is a fiber: barriers and shuffles switch to the
// next one. A barrier that not all threads reach ends the program with a message.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __shared__
#define __restrict__
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(n)
#define __grid_constant__

struct uint3 {
    unsigned x, y, z;
};
static inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }

namespace emu {
struct Fiber;
struct Warp {
    int alive = 0, arrived = 0;
    unsigned generation = 0;
    unsigned char slots[32][64];
};
struct Fiber {
    void *stack_pointer = nullptr;
    uint3 thread{};
    int lane = 0;
    Warp *warp = nullptr;
    bool done = false;
};
extern Fiber *current;
extern uint3 block, grid, threads;
void sync_block();
void sync_warp();
} // namespace emu

#define threadIdx (emu::current->thread)
#define blockIdx (emu::block)
#define gridDim (emu::grid)
#define blockDim (emu::threads)
static constexpr unsigned warpSize = 32;
extern "C" unsigned char dynamic_shared_mem[];

using std::abs, std::exp, std::sqrt, std::tanh, std::erf, std::fma;
using std::max;
using std::min;
static inline void __syncthreads() { emu::sync_block(); }
static inline void __syncwarp() { emu::sync_warp(); }

// Blocks run one after the other, so that memory is as its last writer left it.
static inline void __threadfence() {}
template <class T> static inline T atomicAdd(T *at, std::type_identity_t<T> by) {
    T before = *at;
    *at = before + by;
    return before;
}
static inline uint32_t atomicExch(uint32_t *at, uint32_t value) {
    uint32_t before = *at;
    *at = value;
    return before;
}

static inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint64_t(a) * b >> 32; }

template <class T> static inline T emu_exchange(T value, unsigned from) {
    emu::Warp &warp = *emu::current->warp;
    std::memcpy(warp.slots[emu::current->lane], &value, sizeof(T));
    emu::sync_warp();
    T out;
    std::memcpy(&out, warp.slots[from & 31], sizeof(T));
    emu::sync_warp();
    return out;
}
template <class T> static inline T __shfl_xor_sync(unsigned, T value, unsigned mask) {
    return emu_exchange(value, emu::current->lane ^ mask);
}
template <class T> static inline T __shfl_sync(unsigned, T value, unsigned lane) { return emu_exchange(value, lane); }
template <class T> static inline T __shfl_down_sync(unsigned, T value, unsigned delta) {
    unsigned to = emu::current->lane + delta;
    return emu_exchange(value, to < 32 ? to : emu::current->lane);
}

typedef _Float16 __half;
struct alignas(4) __half2 {
    __half x, y;
};
static inline __half2 operator+(__half2 a, __half2 b) { return {__half(a.x + b.x), __half(a.y + b.y)}; }
static inline __half2 operator-(__half2 a, __half2 b) { return {__half(a.x - b.x), __half(a.y - b.y)}; }
static inline __half2 operator*(__half2 a, __half2 b) { return {__half(a.x * b.x), __half(a.y * b.y)}; }

// bfloat16: the upper half of a float.
struct __nv_bfloat16 {
    uint16_t bits;
    __nv_bfloat16() = default;
    explicit __nv_bfloat16(float f) {
        uint32_t u;
        std::memcpy(&u, &f, 4);
        bits = uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
    }
    operator float() const {
        uint32_t u = uint32_t(bits) << 16;
        float f;
        std::memcpy(&f, &u, 4);
        return f;
    }
};
struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};

// Fast forms of functions, by their exact ones.
static inline float rsqrt(float x) { return 1.0f / std::sqrt(x); }
static inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
static inline float __frsqrt_rn(float x) { return 1.0f / std::sqrt(x); }

// mma.sync.m16n8k16 with f16 factors and f32 sums. Lane l has: of A the rows l/4 and l/4 + 8, columns 2(l%4), +1, and
// the same + 8; of B the rows 2(l%4), +1, and the same + 8, column l/4; of C the rows of A, columns 2(l%4), +1.
static inline void emu_mma(uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, float c0,
                           float c1, float c2, float c3, float &d0, float &d1, float &d2, float &d3) {
    emu::Warp &warp = *emu::current->warp;
    const int lane = emu::current->lane;
    uint32_t mine[6] = {a0, a1, a2, a3, b0, b1};
    std::memcpy(warp.slots[lane], mine, sizeof mine);
    emu::sync_warp();
    auto half = [&](int from, int reg, int high) {
        __half h;
        std::memcpy(&h, warp.slots[from] + 4 * reg + 2 * high, 2);
        return float(h);
    };
    auto a = [&](int row, int k) { return half(4 * (row % 8) + k % 8 / 2, row / 8 + 2 * (k / 8), k % 2); };
    auto b = [&](int k, int col) { return half(4 * col + k % 8 / 2, 4 + k / 8, k % 2); };
    const int row = lane / 4, col = 2 * (lane % 4);
    float sums[4] = {c0, c1, c2, c3};
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 16; k++) sums[i] += a(row + 8 * (i / 2), k) * b(k, col + i % 2);
    emu::sync_warp();
    d0 = sums[0], d1 = sums[1], d2 = sums[2], d3 = sums[3];
}
// `asm volatile("mma.sync…" : … : …);` in a function with operands of these names.
#define asm
#define volatile(...)                                                                                                  \
    emu_mma(reg_a_0, reg_a_1, reg_a_2, reg_a_3, reg_b_0, reg_b_1, reg_c_0, reg_c_1, reg_c_2, reg_c_3, reg_d_0,         \
            reg_d_1, reg_d_2, reg_d_3)

// A kernel as a table knows it.
struct Kernel {
    const char *name;
    void (*call)(void **args);
    int arity;
    const size_t *sizes; // of the parameters, in bytes
};
template <class... A, size_t... I>
static inline void emu_apply(void (*f)(A...), void **args, std::index_sequence<I...>) {
    f(*static_cast<A *>(args[I])...);
}
template <auto f> struct Caller;
template <class... A, void (*f)(A...)> struct Caller<f> {
    static constexpr int arity = sizeof...(A);
    static constexpr size_t sizes[] = {sizeof(A)..., 0};
    static void call(void **args) { emu_apply<A...>(f, args, std::index_sequence_for<A...>{}); }
};
#define KERNEL(name) {#name, Caller<name>::call, Caller<name>::arity, Caller<name>::sizes}
