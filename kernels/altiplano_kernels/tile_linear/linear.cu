// x @ w.T for tens to hundreds of rows: one warp keeps the tensor copy engine busy, groups of four warps multiply what has come.
//
// A block computes ROWS x COLUMNS sums over one part of K, in steps of DEPTH: tiles of x and w arrive in a ring of STAGES in shared
// memory, in boxes of 128 bytes a row, in the pattern (swizzle) that wgmma reads without conflicts. The first weights are asked for before the wait for
// the kernel before. Blocks that share a tile do not send it to each other (multicast): that was measured, and a third slower.
//
// Compiled once per use with: GROUPS (of four warps), TILES (of 64 rows, per group), COLUMNS (64 or 128), DEPTH (a multiple of 64), STAGES,
// SPLITS (parts of K), RESIDENT (blocks that fit one processor), KIND (0: bf16, 1: float32 parts, 2: bf16 silu(gate) * up, where w has the
// rows of gate and then those of up, 3: no product at all, but the best token of each row and block under its temperature and noise).
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

constexpr int ROWS = GROUPS * TILES * 64, BOX = 64, BOXES = DEPTH / BOX, THREADS = GROUPS * 128 + 32;
constexpr int X_BYTES = ROWS * DEPTH * 2, W_BYTES = COLUMNS * DEPTH * 2, STAGE_BYTES = X_BYTES + W_BYTES;
constexpr int HALVES = KIND == 2 ? 2 : 1;  // w comes as so many boxes
static_assert(COLUMNS == 64 || COLUMNS == 128, "there are two shapes of wgmma here");
static_assert(ROWS <= 256, "a box has at most 256 rows");

struct alignas(64) Map { char bytes[128]; };  // a CUtensorMap
struct Args {
  Map x, w;   // bf16 [rows, depth], [columns of w, depth]
  void* out;  // bf16 [rows, columns], or float32 [SPLITS, rows, columns]
  int rows, columns, depth, unused;
  // For draws; float32 and int32 [rows, blocks of columns], int32 [rows], and float32, int64, int32 by slot.
  float* values;
  int* ids;
  const int* slots;
  const float* temperatures;
  const long long* seeds;
  const int* steps;
};

__device__ __forceinline__ u32 address_of(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void wait_for(u32 barrier, u32 parity) {
  u32 done = 0;
  while (!done)
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
}
// A box of 64 columns of a matrix.
__device__ __forceinline__ void load(const Map& map, u32 to, int column, int row, u32 barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
               :: "r"(to), "l"(&map), "r"(column), "r"(row), "r"(barrier) : "memory");
}
// Rows of 128 bytes, the pattern repeating after 1,024.
__device__ __forceinline__ u64 tile_at(u32 address) { return (u64)((address & 0x3ffff) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62; }

#define OF4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define OF16(i) OF4(i), OF4(i + 4), OF4(i + 8), OF4(i + 12)
#define TO32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TO64 \
  TO32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
// d += a tile of 64 x 16 times one of 16 x COLUMNS; `keep` = 0: d = their product.
__device__ __forceinline__ void multiply(float (&d)[32], u64 a, u64 b, int keep) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" TO32 "}, %32, %33, p, 1, 1, 0, 0;\n}"
               : OF16(0), OF16(16) : "l"(a), "l"(b), "r"(keep));
}
__device__ __forceinline__ void multiply(float (&d)[64], u64 a, u64 b, int keep) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" TO64 "}, %64, %65, p, 1, 1, 0, 0;\n}"
               : OF16(0), OF16(16), OF16(32), OF16(48) : "l"(a), "l"(b), "r"(keep));
}
__device__ __forceinline__ u32 to_bf16(float low, float high) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
__device__ __forceinline__ u32 mix(u32 x) {  // lowbias32 (C. Wellons), as in the sampling kernel
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}
__device__ __forceinline__ float log2_of(float x) {
  asm("lg2.approx.f32 %0, %1;" : "=f"(x) : "f"(x));
  return x;
}
// The sampling kernel's noise, to about 3e-6 of -log(u): close to one the quick logarithm is not enough.
__device__ __forceinline__ float gumbel(u32 bits) {
  const float u = fminf(((float)bits + 0.5f) * 2.3283064365386963e-10f, 0.999999940395355f), t = 1.f - u;
  const float series = t * (1.f + t * (1.f / 2 + t * (1.f / 3 + t * (1.f / 4 + t * (1.f / 5)))));
  return log2_of(u > 0.9375f ? series : log2_of(u) * -0.6931471805599453f) * -0.6931471805599453f;
}
// A 4 x 4 matrix of which each of four neighbouring lanes has a column, turned.
__device__ __forceinline__ void turn(u32 (&v)[4], int lane) {
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (i & bit) continue;
      const u32 sent = lane & bit ? v[i] : v[i + bit], got = __shfl_xor_sync(0xffffffffu, sent, bit);
      if (lane & bit) v[i] = got; else v[i + bit] = got;
    }
}
__device__ __forceinline__ float gated(float gate, float up) { return __fdividef(gate, 1.f + __expf(-gate)) * up; }

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) tile_linear(const __grid_constant__ Args a) {
  extern __shared__ unsigned char shared[];
  __shared__ u64 full[STAGES], empty[STAGES];
  const u32 ring = (address_of(shared) + 1023) & ~1023u;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int steps = a.depth / (SPLITS * DEPTH), begin = blockIdx.z * steps * DEPTH;

  if (threadIdx.x == GROUPS * 128) {
    asm volatile("prefetch.tensormap [%0];\nprefetch.tensormap [%1];" :: "l"(&a.w), "l"(&a.x) : "memory");
    for (int s = 0; s < STAGES; s++) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(address_of(&full[s])), "r"(1));
      asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(address_of(&empty[s])), "r"(GROUPS * 4));
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();

  if (warp == GROUPS * 4) {
    if (lane > 0) return;
    auto load_x = [&](int step) {
      const u32 stage = step % STAGES;
      for (int box = 0; box < BOXES; box++)
        load(a.x, ring + stage * STAGE_BYTES + box * (X_BYTES / BOXES), begin + step * DEPTH + box * BOX, blockIdx.x * ROWS, address_of(&full[stage]));
    };
    auto load_w = [&](int step) {
      const u32 stage = step % STAGES, barrier = address_of(&full[stage]), to = ring + stage * STAGE_BYTES + X_BYTES;
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(barrier), "r"(STAGE_BYTES) : "memory");
      for (int half = 0; half < HALVES; half++)
        for (int box = 0; box < BOXES; box++)
          load(a.w, to + box * (W_BYTES / BOXES) + half * (W_BYTES / BOXES / 2), begin + step * DEPTH + box * BOX,
               half * a.columns + blockIdx.y * (COLUMNS / HALVES), barrier);
    };
    const int first = min(steps, STAGES);
    for (int step = 0; step < first; step++) load_w(step);
    asm volatile("griddepcontrol.wait;\nfence.proxy.async;" ::: "memory");
    for (int step = 0; step < first; step++) load_x(step);
    asm volatile("griddepcontrol.launch_dependents;");
    for (int step = first; step < steps; step++) {
      wait_for(address_of(&empty[step % STAGES]), (step / STAGES - 1) & 1);
      load_w(step);
      load_x(step);
    }
    return;
  }

  const int group = warp / 4;
  float sums[TILES][COLUMNS / 2];
  for (int step = 0; step < steps; step++) {
    const int stage = step % STAGES;
    wait_for(address_of(&full[stage]), step / STAGES & 1);
    const u32 x = ring + stage * STAGE_BYTES + group * TILES * 8192, w = ring + stage * STAGE_BYTES + X_BYTES;
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int k = 0; k < DEPTH / 16; k++)
#pragma unroll
      for (int t = 0; t < TILES; t++)
        multiply(sums[t], tile_at(x + k / 4 * (X_BYTES / BOXES) + t * 8192) + k % 4 * 2, tile_at(w + k / 4 * (W_BYTES / BOXES)) + k % 4 * 2, step > 0 || k > 0);
    asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 1;" ::: "memory");
    // The products of the step before have ended.
    if (step > 0 && lane == 0)
      asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(address_of(&empty[(step - 1) % STAGES])) : "memory");
  }
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  if constexpr (KIND == 3) asm volatile("griddepcontrol.wait;" ::: "memory");
#pragma unroll
  for (int t = 0; t < TILES; t++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int m = (blockIdx.x * GROUPS * TILES + group * TILES + t) * 64 + warp % 4 * 16 + half * 8 + lane / 4;
      float* s = &sums[t][half * 2];  // of this row: 4 i and 4 i + 1, of columns 8 i + lane % 4 * 2 and the next
      if constexpr (KIND == 2)
#pragma unroll
        for (int i = 0; i < COLUMNS / 4; i += 4) {
          s[i] = gated(s[i], s[i + COLUMNS / 4]);
          s[i + 1] = gated(s[i + 1], s[i + 1 + COLUMNS / 4]);
        }
      constexpr int EIGHTS = COLUMNS / 8 / HALVES;
      const u64 at = (u64)m * a.columns + blockIdx.y * (COLUMNS / HALVES);
      if constexpr (KIND == 3) {
        const bool inside = m < a.rows;
        const int slot = inside ? a.slots[m] : 0;
        const float temperature = inside ? a.temperatures[slot] : 0.f;
        float best = __int_as_float(0xff800000);  // -infinity
        int where = 0;
        auto consider = [&](float value, int id) {
          if (value > best) best = value, where = id;
        };
        const int first = blockIdx.y * COLUMNS + lane % 4 * 2;
        if (temperature < 1e-5f) {
#pragma unroll
          for (int i = 0; i < EIGHTS; i++) consider(s[i * 4], first + i * 8), consider(s[i * 4 + 1], first + i * 8 + 1);
        } else {
          const u64 seed = a.seeds[slot];
          const u32 noise = mix(mix((u32)seed ^ mix((u32)(seed >> 32))) ^ (u32)a.steps[slot]);
          const float sharpness = __fdividef(1.f, temperature);
#pragma unroll
          for (int i = 0; i < EIGHTS; i++)
#pragma unroll
            for (int j = 0; j < 2; j++) consider(s[i * 4 + j] * sharpness + gumbel(mix(noise ^ (u32)(first + i * 8 + j))), first + i * 8 + j);
        }
        // The best of the four lanes of a row; the lowest token among equals.
#pragma unroll
        for (int apart = 1; apart < 4; apart *= 2) {
          const float other = __shfl_xor_sync(0xffffffffu, best, apart);
          const int at = __shfl_xor_sync(0xffffffffu, where, apart);
          if (other > best || (other == best && at < where)) best = other, where = at;
        }
        if (inside && lane % 4 == 0) {
          a.values[m * gridDim.y + blockIdx.y] = best;
          a.ids[m * gridDim.y + blockIdx.y] = where;
        }
      } else if constexpr (KIND == 1) {
        if (m < a.rows)
#pragma unroll
          for (int i = 0; i < EIGHTS; i++)
            *(float2*)((float*)a.out + (u64)blockIdx.z * a.rows * a.columns + at + i * 8 + lane % 4 * 2) = make_float2(s[i * 4], s[i * 4 + 1]);
      } else {
#pragma unroll
        for (int i = 0; i < EIGHTS; i += 4) {
          // Four lanes have a pair each of four eights; afterwards each has one of the eights, which is 16 bytes.
          u32 pairs[4];
#pragma unroll
          for (int j = 0; j < 4; j++) pairs[j] = to_bf16(s[(i + j) * 4], s[(i + j) * 4 + 1]);
          turn(pairs, lane % 4);
          if (m < a.rows) *(uint4*)((u16*)a.out + at + (i + lane % 4) * 8) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        }
      }
    }
}
