// x @ w.T for tens to hundreds of rows: one warp keeps the tensor copy engine busy, groups of four warps multiply what has come.
//
// A block computes ROWS x COLUMNS sums over one part of K, in steps of DEPTH: tiles of x and w arrive in a ring of STAGES in shared
// memory, in boxes of 128 bytes a row, in the pattern (swizzle) that wgmma reads without conflicts. The first weights are asked for before the wait for
// the kernel before. Blocks that share a tile do not send it to each other (multicast): that was measured, and a third slower.
// Blocks that draw walk over tiles of columns, so that the ring fills and other groups multiply while one group draws.
//
// Compiled once per use with: GROUPS (of four warps), TILES (of 64 rows, per group), COLUMNS (64 or 128), DEPTH (a multiple of 64), STAGES,
// SPLITS (parts of K), RESIDENT (blocks that fit one processor), KIND (0: bf16, 1: float32 parts, 2: bf16 silu(gate) * up, where w has the
// rows of gate and then those of up, 3: no product at all, but the best token of each row and block under its temperature and noise).
#include "../hopper.cuh"

constexpr int ROWS = GROUPS * TILES * 64, BOX = 64, BOXES = DEPTH / BOX, THREADS = GROUPS * 128 + 32;
constexpr int X_BYTES = ROWS * DEPTH * 2, W_BYTES = COLUMNS * DEPTH * 2, STAGE_BYTES = X_BYTES + W_BYTES;
constexpr int HALVES = KIND == 2 ? 2 : 1;  // w comes as so many boxes
constexpr int WIDTH = COLUMNS / HALVES, EIGHTS = WIDTH / 8;
constexpr bool DRAWS = KIND == 3;
constexpr int NARROW = DRAWS && COLUMNS == 128 ? 80 : WIDTH;  // columns of the last tile of each block that draws, where that is enough
static_assert(COLUMNS == 64 || COLUMNS == 128, "there are two shapes of wgmma here");
static_assert(ROWS <= 256, "a box has at most 256 rows");

struct Args {
  Map x, w;   // bf16 [rows, depth], [columns of w, depth]
  void* out;  // bf16 [rows, columns], or float32 [SPLITS, rows, columns]
  int rows, columns, depth, unused;
  // For draws; float32 and int32 [rows, blocks], int32 [rows], and float32, int64, int32 by slot.
  float* values;
  int* ids;
  const int* slots;
  const float* temperatures;
  const long long* seeds;
  const int* steps;
};

// Rows of 128 bytes, the pattern repeating after 1,024.
__device__ __forceinline__ u64 tile_at(u32 address) { return (u64)((address & 0x3ffff) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62; }

// Of the first 80 columns alone.
__device__ __forceinline__ void multiply_narrow(float (&d)[64], u64 a, u64 b, int keep) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %42, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n80k16.f32.bf16.bf16 {" TO32 ", %32, %33, %34, %35, %36, %37, %38, %39}, %40, %41, p, 1, 1, 0, 0;\n}"
               : OF16(0), OF16(16), OF4(32), OF4(36) : "l"(a), "l"(b), "r"(keep));
}
__device__ __forceinline__ u32 finish_mix(u32 x) {
  x *= 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}
__device__ __forceinline__ u32 mix(u32 x) { return finish_mix(x ^ x >> 16); }  // lowbias32 (C. Wellons), as in the sampling kernel
__device__ __forceinline__ float log2_of(float x) {
  asm("lg2.approx.f32 %0, %1;" : "=f"(x) : "f"(x));
  return x;
}
__device__ __forceinline__ float power_of_2(float x) {
  asm("ex2.approx.f32 %0, %1;" : "=f"(x) : "f"(x));
  return x;
}
// The sampling kernel's noise, to about 3e-6 of -log(u): close to one the quick logarithm is not enough.
__device__ __forceinline__ float gumbel(u32 bits) {
  const float u = fminf(((float)bits + 0.5f) * 2.3283064365386963e-10f, 0.999999940395355f), t = 1.f - u;
  const float series = t * (1.f + t * (1.f / 2 + t * (1.f / 3 + t * (1.f / 4 + t * (1.f / 5)))));
  return log2_of(u > 0.9375f ? series : log2_of(u) * -0.6931471805599453f) * -0.6931471805599453f;
}
// What a thread knows of a row that draws.
struct Row {
  float sharpness;  // one over the temperature; below 0: the row is greedy
  u32 noise;        // of mix(noise ^ token): what the tokens of this thread have in common
  float best;
  int token;
};
constexpr float LOG2_E = 1.4426950408889634f;
#define NOTHING __int_as_float(0xff800000)  // minus infinity

__device__ __forceinline__ float pick(const float (&v)[8], int e) {
  const float a = e & 1 ? v[1] : v[0], b = e & 1 ? v[3] : v[2], c = e & 1 ? v[5] : v[4], d = e & 1 ? v[7] : v[6];
  const float low = e & 2 ? b : a, high = e & 2 ? d : c;
  return e & 4 ? high : low;
}
// Eight sums of a row: of tokens from `first` on, which is a multiple of 8, in pairs that are 8 apart; the pairs of a row's four lanes are neighbours.
__device__ __forceinline__ void consider(Row& row, const float (&v)[8], int first, int lane) {
  auto token_of = [&](int e) { return first + e / 2 * 8 + lane % 4 * 2 + e % 2; };
  if (row.sharpness < 0.f) {
    const float most = fmaxf(fmaxf(fmaxf(v[0], v[1]), fmaxf(v[2], v[3])), fmaxf(fmaxf(v[4], v[5]), fmaxf(v[6], v[7])));
    if (most > row.best) {
      row.best = most;
#pragma unroll
      for (int e = 7; e >= 0; e--)
        if (v[e] == most) row.token = token_of(e);
    }
    return;
  }
  // The noise -log(-log(u)) is below -log(1 - u), so a token whose 1 - u is not below exp(value - best) is not the best. Few are left.
  const float scale = row.sharpness * LOG2_E, base = fmaf(row.best, -LOG2_E, 32.001f);
  u32 left = 0;
#pragma unroll
  for (int e = 0; e < 8; e++) {
    const u32 at = first + e / 2 * 8;
    const u32 bits = finish_mix(row.noise ^ at ^ at >> 16 ^ e % 2);
    left |= (float)~bits < power_of_2(fmaf(v[e], scale, base)) ? 1u << e : 0;
  }
  while (left) {
    const int e = __ffs(left) - 1;
    left &= left - 1;
    const u32 at = first + e / 2 * 8;
    const float value = pick(v, e) * row.sharpness + gumbel(finish_mix(row.noise ^ at ^ at >> 16 ^ e % 2));
    if (value > row.best) row.best = value, row.token = token_of(e);
  }
}

// The sums of a tile, from a stage of the ring on.
template <bool ALL, int SIZE>
__device__ __forceinline__ void multiply_tile(
    float (&sums)[TILES][SIZE], u32 ring, u64 (&full)[STAGES], u64 (&empty)[STAGES], int& stage, int& parity, int steps) {
  const int group = threadIdx.x / 128, lane = threadIdx.x % 32;
  auto give_back = [&](int stage) {
    if (lane == 0) asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(address_of(&empty[stage])) : "memory");
  };
  int last = 0;
  for (int step = 0; step < steps; step++) {
    wait_for(address_of(&full[stage]), parity);
    const u32 x = ring + stage * STAGE_BYTES + group * TILES * 8192, w = ring + stage * STAGE_BYTES + X_BYTES;
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int k = 0; k < DEPTH / 16; k++)
#pragma unroll
      for (int t = 0; t < TILES; t++) {
        const u64 at_x = tile_at(x + k / 4 * (X_BYTES / BOXES) + t * 8192) + k % 4 * 2, at_w = tile_at(w + k / 4 * (W_BYTES / BOXES)) + k % 4 * 2;
        if constexpr (ALL) multiply(sums[t], at_x, at_w, step > 0 || k > 0);
        else multiply_narrow(sums[t], at_x, at_w, step > 0 || k > 0);
      }
    asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 1;" ::: "memory");
    if (step > 0) give_back(last);  // the products of the step before have ended
    last = stage;
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  if constexpr (DRAWS) give_back(last);
}

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

  // Tiles of all blocks that draw come in turns, of which the last is narrow where its columns suffice. Other blocks have one tile.
  const int blocks = gridDim.y, block = blockIdx.y, turns = DRAWS ? (a.columns - 1) / (blocks * WIDTH) + 1 : 1;
  const int before = (turns - 1) * blocks * WIDTH, last_width = a.columns - before <= blocks * NARROW ? NARROW : WIDTH;
  const int tiles = DRAWS && before + block * last_width >= a.columns ? turns - 1 : turns;
  auto first_of = [&](int tile) { return tile < turns - 1 ? (tile * blocks + block) * WIDTH : before + block * last_width; };

  if (warp == GROUPS * 4) {
    if (lane > 0) return;
    auto load_x = [&](int step, u32 stage) {
      for (int box = 0; box < BOXES; box++)
        load(a.x, ring + stage * STAGE_BYTES + box * (X_BYTES / BOXES), begin + step * DEPTH + box * BOX, blockIdx.x * ROWS, address_of(&full[stage]));
    };
    auto load_w = [&](int tile, int step, u32 stage) {
      const u32 barrier = address_of(&full[stage]), to = ring + stage * STAGE_BYTES + X_BYTES;
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(barrier), "r"(STAGE_BYTES) : "memory");
      for (int half = 0; half < HALVES; half++)
        for (int box = 0; box < BOXES; box++)
          load(a.w, to + box * (W_BYTES / BOXES) + half * (W_BYTES / BOXES / 2), begin + step * DEPTH + box * BOX,
               half * a.columns + first_of(tile), barrier);
    };
    const int first = min(steps, STAGES);
    for (int step = 0; step < first; step++) load_w(0, step, step);
    asm volatile("griddepcontrol.wait;\nfence.proxy.async;" ::: "memory");
    for (int step = 0; step < first; step++) load_x(step, step);
    asm volatile("griddepcontrol.launch_dependents;");
    int step = first, stage = first % STAGES, parity = first / STAGES ^ 1;
    for (int tile = 0; tile < tiles; tile++, step = 0)
      for (; step < steps; step++) {
        wait_for(address_of(&empty[stage]), parity);
        load_w(tile, step, stage);
        load_x(step, stage);
        if (++stage == STAGES) stage = 0, parity ^= 1;
      }
    return;
  }

  const int row = (blockIdx.x * GROUPS + warp / 4) * TILES * 64 + warp % 4 * 16 + lane / 4;  // the first of this thread; others are 8 i further
  float sums[TILES][COLUMNS / 2];
  Row rows[TILES][2];
  if constexpr (DRAWS) {
    asm volatile("griddepcontrol.wait;" ::: "memory");
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int m = row + t * 64 + half * 8, slot = m < a.rows ? a.slots[m] : 0;
        const float temperature = m < a.rows ? a.temperatures[slot] : 0.f;
        const u64 seed = a.seeds[slot];
        const u32 noise = mix(mix((u32)seed ^ mix((u32)(seed >> 32))) ^ (u32)a.steps[slot]) ^ lane % 4 * 2;
        rows[t][half] = {temperature < 1e-5f ? -1.f : __fdividef(1.f, temperature), noise ^ noise >> 16, NOTHING, 0};
      }
  }
  int stage = 0, parity = 0;
  for (int tile = 0; tile < tiles; tile++) {
    const int first = first_of(tile);
    if (NARROW < WIDTH && tile == turns - 1 && last_width < WIDTH) {
      if constexpr (NARROW < WIDTH) multiply_tile<false>(sums, ring, full, empty, stage, parity, steps);
#pragma unroll
      for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int i = 0; i < COLUMNS / 8; i++)
          if (i * 8 >= NARROW || first + i * 8 >= a.columns) sums[t][i * 4] = sums[t][i * 4 + 1] = sums[t][i * 4 + 2] = sums[t][i * 4 + 3] = NOTHING;
    } else {
      multiply_tile<true>(sums, ring, full, empty, stage, parity, steps);
    }
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int m = row + t * 64 + half * 8;
        float* s = &sums[t][half * 2];  // of this row: 4 i and 4 i + 1, of columns 8 i + lane % 4 * 2 and the next
        if constexpr (KIND == 2)
#pragma unroll
          for (int i = 0; i < COLUMNS / 4; i += 4) {
            s[i] = swiglu(s[i], s[i + COLUMNS / 4]);
            s[i + 1] = swiglu(s[i + 1], s[i + 1 + COLUMNS / 4]);
          }
        const u64 at = (u64)m * a.columns + first;
        if constexpr (DRAWS) {
          Row& mine = rows[t][half];
#pragma unroll
          for (int i = 0; i < EIGHTS; i += 4) {
            const float v[8] = {s[i * 4], s[i * 4 + 1], s[i * 4 + 4], s[i * 4 + 5], s[i * 4 + 8], s[i * 4 + 9], s[i * 4 + 12], s[i * 4 + 13]};
            consider(mine, v, first + i * 8, lane);
          }
          // The best of the four lanes of a row; the lowest token among equals.
#pragma unroll
          for (int apart = 1; apart < 4; apart *= 2) {
            const float other = __shfl_xor_sync(0xffffffffu, mine.best, apart);
            const int token = __shfl_xor_sync(0xffffffffu, mine.token, apart);
            if (other > mine.best || (other == mine.best && token < mine.token)) mine.best = other, mine.token = token;
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
  if constexpr (DRAWS)
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int m = row + t * 64 + half * 8;
        if (m < a.rows && lane % 4 == 0) a.values[m * blocks + block] = rows[t][half].best, a.ids[m * blocks + block] = rows[t][half].token;
      }
}
