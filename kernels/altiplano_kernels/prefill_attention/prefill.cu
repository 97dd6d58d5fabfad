// Causal attention of prompt chunks over pages, of the FlashAttention-3 type (Shah et al., 2024): one warp keeps the tensor copy engine
// busy, groups of four warps multiply what has come.
//
// A group of warps owns 64 queries of one head; the groups of a block are heads that share keys and values, so these come once for all of
// them, and all groups end at the same diagonal. Weights stay in registers, where they are the first factor of the second product. That
// product runs while the next scores are softened. Blocks stay and take turns at the tiles, so the first keys of one tile are on their way
// while the one before ends.
//
// What a query becomes depends, to the bit, on itself and the keys that it sees only: tiles of keys begin at multiples of KEYS, and those
// that a query does not see count as exact zeros.
//
// Compiled once per use with: HEAD_DIM (64 or 128), GROUP (query heads of a KV head), KV_HEADS, PAGE, GROUPS (of four warps), KEYS (of a
// tile: 64 or 128), STAGES, RESIDENT (blocks that fit one processor), OVERLAP (0: a group does one thing at a time, which takes fewer
// registers), KIND (0 bf16, 1 int8, 2 e4m3).
#include "../hopper.cuh"

constexpr int ROWS = 64, BOX = PAGE < KEYS ? PAGE : KEYS, SLICES = HEAD_DIM / 64, LOADERS = KIND ? 4 : 1, THREADS = GROUPS * 128 + 128;
// A processor has four parts of 512 registers a lane, and each has a warp of every group; those that load need few, the others get theirs.
constexpr int BEGIN_REGISTERS = 512 / (RESIDENT * (GROUPS + 1)) / 8 * 8, LOAD_REGISTERS = KIND ? 64 : 32;
constexpr int LEFT = ((BEGIN_REGISTERS < 248 ? BEGIN_REGISTERS : 248) * (GROUPS + 1) - LOAD_REGISTERS) / GROUPS / 8 * 8, REGISTERS = LEFT < 240 ? LEFT : 240;
constexpr int QUERIES = 2, RAW = 3;  // stages of queries, and of codes
constexpr int TILE_BYTES = KEYS * HEAD_DIM * 2, QUERY_BYTES = ROWS * HEAD_DIM * 2, PARTS = GROUP / GROUPS;
// A maximum that is so little too low (a factor of 256) is kept: weights up to 256 are as exact, and sums need not shrink.
constexpr float SLACK = 8.f, HIDDEN = -1e30f;
static_assert(HEAD_DIM == 64 || HEAD_DIM == 128, "there are two shapes of wgmma here");
static_assert(GROUP % GROUPS == 0, "the heads of a block share keys and values");
static_assert(KEYS % BOX == 0 && PAGE % BOX == 0 && BOX % 8 == 0, "tiles are of whole boxes, and boxes of whole patterns");

struct Tile { int first, count, position, slot; };
struct Args {
  Map query, cache;   // bf16 [rows, heads * HEAD_DIM], [blocks * 2 * KV_HEADS * PAGE, HEAD_DIM]
  const u16* scales;  // float16 [blocks, 2, KV_HEADS, PAGE] for 8 bit
  const int* tables;  // [slots, stride_table]
  const Tile* tiles;
  u16* out;           // bf16 [rows, heads * HEAD_DIM], rows stride_out apart
  int count, stride_table, stride_out;
  float softmax_scale;  // times log2 e
};

// What all lanes have anyway, so that the compiler keeps what follows from it once for all of them.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(~0u, x, 0); }
__device__ __forceinline__ void arrive(u32 barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(barrier) : "memory"); }
__device__ __forceinline__ void expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(barrier), "r"(bytes) : "memory");
}
// A matrix in shared memory as wgmma takes it: rows of 128 bytes, the pattern repeating after 1,024. `at`: of `place`, in units of 16 bytes.
__device__ __forceinline__ u64 matrix(u32 at) { return 64ull << 32 | 1ull << 62 | at; }
// `apart`: bytes between 64 columns and the next 64, where columns are what is not summed over.
__device__ __forceinline__ u32 place(u32 address, u32 apart = 16) { return (address & 0x3ffff) >> 4 | apart >> 4 << 16; }

// d += 64 x 16 numbers in registers times 16 x 64 or 16 x 128, whose columns are contiguous; `keep` = 0: d = their product.
__device__ __forceinline__ void multiply(float (&d)[32], const u32* a, u64 b, int keep) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" TO32 "}, {%32, %33, %34, %35}, %36, p, 1, 1, 1;\n}"
               : OF16(0), OF16(16) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep));
}
__device__ __forceinline__ void multiply(float (&d)[64], const u32* a, u64 b, int keep) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" TO64 "}, {%64, %65, %66, %67}, %68, p, 1, 1, 1;\n}"
               : OF16(0), OF16(16), OF16(32), OF16(48) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep));
}
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most `LATER` groups of products are under way; nothing of `d` is read before.
template <int LATER>
__device__ __forceinline__ void finish(float (&d)[32]) {
  asm volatile("wgmma.wait_group.sync.aligned %32;" : OF16(0), OF16(16) : "n"(LATER) : "memory");
}
template <int LATER>
__device__ __forceinline__ void finish(float (&d)[64]) {
  asm volatile("wgmma.wait_group.sync.aligned %64;" : OF16(0), OF16(16), OF16(32), OF16(48) : "n"(LATER) : "memory");
}
__device__ __forceinline__ float power_of_2(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

struct Barriers { u64 full_k[STAGES], empty_k[STAGES], full_v[STAGES], empty_v[STAGES], full_q[QUERIES], empty_q[QUERIES], full_raw[RAW]; };

// The turns of this block: forth and back over the blocks, so that none gets the longest of each round.
__device__ __forceinline__ int item_of(int round) {
  return round * gridDim.x + (round & 1 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
}
struct Item {
  int tile, head, query_head;  // KV head, and head of the first group
  __device__ __forceinline__ Item(int item)
      : tile(item / (KV_HEADS * PARTS)), head(item / PARTS % KV_HEADS), query_head(item / PARTS % KV_HEADS * GROUP + item % PARTS * GROUPS) {}
};

// Of the softmax of rows g and g + 8 of a warp, in four lanes a row.
struct Rows {
  float peak[2] = {HIDDEN, HIDDEN}, total[2] = {0.f, 0.f}, shrink[2];

  // Scores to weights. `shrink` becomes what earlier sums are to be multiplied by.
  __device__ __forceinline__ void soften(float (&s)[KEYS / 2], float scale) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float top = fmaxf(s[h * 2], s[h * 2 + 1]);
#pragma unroll
      for (int i = 4; i < KEYS / 2; i += 4) top = fmaxf(top, fmaxf(s[i + h * 2], s[i + h * 2 + 1]));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      const bool higher = (top - peak[h]) * scale > SLACK;
      shrink[h] = higher ? power_of_2((peak[h] - top) * scale) : 1.f;
      peak[h] = higher ? top : peak[h];
      const float base = peak[h] * scale;
      float sums[2];
#pragma unroll
      for (int i = 0; i < KEYS / 2; i += 4)
#pragma unroll
        for (int j = 0; j < 2; j++) {
          float& x = s[i + h * 2 + j];
          x = power_of_2(fmaf(x, scale, -base));
          sums[j] = i ? sums[j] + x : x;
        }
      total[h] = total[h] * shrink[h] + (sums[0] + sums[1]);
    }
  }
  __device__ __forceinline__ void fit(float (&o)[HEAD_DIM / 2]) const {
    if (!__any_sync(~0u, shrink[0] != 1.f || shrink[1] != 1.f)) return;
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; i++) o[i] *= shrink[i / 2 % 2];
  }
};

#include "bring.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) prefill_attention(const __grid_constant__ Args a) {
  extern __shared__ unsigned char shared[];
  __shared__ Barriers barriers;
  __shared__ Tile shown[QUERIES];  // the tiles whose queries are in shared memory
  __shared__ float scales[KIND ? STAGES : 1][2][KEYS];  // of each stage, of keys and values
  const u32 keys = (address_of(shared) + 1023) & ~1023u, values = keys + STAGES * TILE_BYTES, queries = values + STAGES * TILE_BYTES;
  const Shared at = {barriers, shown, keys, values, queries, queries + QUERIES * GROUPS * QUERY_BYTES, scales};
  const int warp = uniform(threadIdx.x / 32), lane = threadIdx.x % 32, group = warp / 4;

  if (threadIdx.x == GROUPS * 128) {
    asm volatile("prefetch.tensormap [%0];\nprefetch.tensormap [%1];" :: "l"(&a.query), "l"(&a.cache) : "memory");
    auto begin = [](u64& barrier, int count) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(address_of(&barrier)), "r"(count)); };
    for (int s = 0; s < STAGES; s++) {
      begin(barriers.full_k[s], LOADERS), begin(barriers.full_v[s], LOADERS);
      begin(barriers.empty_k[s], GROUPS * 4), begin(barriers.empty_v[s], GROUPS * 4);
    }
    for (int i = 0; i < RAW; i++) begin(barriers.full_raw[i], 1);
    for (int i = 0; i < QUERIES; i++) begin(barriers.full_q[i], 1), begin(barriers.empty_q[i], GROUPS * 4);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  if (group == GROUPS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(LOAD_REGISTERS));
#if KIND == 0
    if (warp % 4 == 0) produce(a, at, lane);
#else
    convert(a, at, warp % 4, lane);
#endif
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(REGISTERS));

  const int g = lane / 4, t = lane % 4, items = a.count * KV_HEADS * PARTS;
  const u32 keys_at = uniform(place(keys)), values_at = uniform(place(values, KEYS * 128));
  u32 step = 0;
  for (int round = 0; item_of(round) < items; round++) {
    const int buffer = round % QUERIES;
    wait_for(address_of(&barriers.full_q[buffer]), round / QUERIES & 1);
    const Tile tile = {shown[buffer].first, shown[buffer].count, uniform(shown[buffer].position), 0};
    const u32 q = place(queries + (buffer * GROUPS + group) * QUERY_BYTES);

    const int end = tile.position + tile.count;
    const u32 begin_step = step, end_step = step + uniform((u32)(end + KEYS - 1) / KEYS);
    const int row = tile.position + warp % 4 * 16 + g;
    float o[HEAD_DIM / 2], s[KEYS / 2];
    u32 p[KEYS / 4];
    Rows rows;

    auto score = [&] {  // s = q k^T of tile `step`, under way
      wait_for(address_of(&barriers.full_k[step % STAGES]), step / STAGES & 1);
      const u32 k_at = keys_at + step % STAGES * (TILE_BYTES / 16);
      begin_products();
#pragma unroll
      for (int k = 0; k < HEAD_DIM / 16; k++)
        multiply(s, matrix(q + k / 4 * ROWS * 8 + k % 4 * 2), matrix(k_at + k / 4 * KEYS * 8 + k % 4 * 2), k > 0);
      commit();
    };
    auto mask = [&] {
      const int start = (int)(step - begin_step) * KEYS;
      if (start + KEYS <= tile.position + 1) return;
#pragma unroll
      for (int i = 0; i < KEYS / 2; i++)
        if (start + i / 4 * 8 + t * 2 + i % 2 > row + i / 2 % 2 * 8) s[i] = HIDDEN;
    };
    auto add = [&](u32 of, bool last) {  // o += p v of tile `of`, under way
      const u32 v_at = values_at + of % STAGES * (TILE_BYTES / 16);
      wait_for(address_of(&barriers.full_v[of % STAGES]), of / STAGES & 1);
      const int valid = end - (int)(of - begin_step) * KEYS;
      if (KIND == 0 && last && valid < KEYS) {
        // What lies behind the last token may be no number, and zero times that is none.
        for (int i = threadIdx.x % 128; i < (KEYS - valid) * SLICES * 8; i += 128) {
          const u32 at = values + of % STAGES * TILE_BYTES + i % SLICES * KEYS * 128 + (valid + i / SLICES / 8) * 128 + i / SLICES % 8 * 16;
          asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" :: "r"(at), "r"(0) : "memory");
        }
        asm volatile("fence.proxy.async.shared::cta;\nbar.sync %0, 128;" :: "r"(group + 1) : "memory");
      }
      begin_products();
#pragma unroll
      for (int k = 0; k < KEYS / 16; k++) multiply(o, p + k * 4, matrix(v_at + k * 128), of > begin_step || k > 0);
      commit();
    };
    // The scales of the keys or values of tile `step` that this lane has to do with: pairs that are eight apart.
    auto scales_of = [&](int side, float2 (&by)[KEYS / 8]) {
#pragma unroll
      for (int i = 0; i < KEYS / 8; i++) by[i] = *(const float2*)&scales[step % STAGES][side][i * 8 + t * 2];
    };
    auto restore = [&] {
      if (!KIND) return;
      float2 by[KEYS / 8];
      scales_of(0, by);
#pragma unroll
      for (int i = 0; i < KEYS / 2; i++) s[i] *= i % 2 ? by[i / 4].y : by[i / 4].x;
      __syncwarp();
    };
    auto pack = [&] {
      float2 by[KEYS / 8];
      if (KIND) {
        wait_for(address_of(&barriers.full_v[step % STAGES]), step / STAGES & 1);
        scales_of(1, by);
      }
#pragma unroll
      for (int i = 0; i < KEYS / 8; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
          float* const of = &s[i * 4 + h * 2];
          p[i * 2 + h] = KIND ? to_bf16(of[0] * by[i].x, of[1] * by[i].y) : to_bf16(of[0], of[1]);
        }
    };
    auto release = [&](u64& barrier) {
      if (lane == 0) arrive(address_of(&barrier));
    };

    score();
    finish<0>(s);
    restore();
    release(barriers.empty_k[step % STAGES]);
    mask();
    rows.soften(s, a.softmax_scale);
    pack();
    for (step++; step < end_step; step++) {
#if OVERLAP
      score();
      add(step - 1, false);
      finish<1>(s);
      restore();
      release(barriers.empty_k[step % STAGES]);
      mask();
      rows.soften(s, a.softmax_scale);
      // Never so: the branch keeps the compiler from waiting for the product before the softmax.
      if (rows.total[0] + rows.total[1] < 0.f) asm volatile("nanosleep.u32 1;" ::: "memory");
      finish<0>(o);
      release(barriers.empty_v[(step - 1) % STAGES]);
      rows.fit(o);
      pack();
#else
      add(step - 1, false);
      finish<0>(o);
      release(barriers.empty_v[(step - 1) % STAGES]);
      score();
      finish<0>(s);
      restore();
      release(barriers.empty_k[step % STAGES]);
      mask();
      rows.soften(s, a.softmax_scale);
      rows.fit(o);
      pack();
#endif
    }
    release(barriers.empty_q[buffer]);
    add(step - 1, true);
    finish<0>(o);
    release(barriers.empty_v[(step - 1) % STAGES]);

#pragma unroll
    for (int h = 0; h < 2; h++) {
      float total = rows.total[h];
      total += __shfl_xor_sync(~0u, total, 1);
      total += __shfl_xor_sync(~0u, total, 2);
      const float by = __fdividef(1.f, total);
      const int m = warp % 4 * 16 + h * 8 + g;
      u16* const to = a.out + (u64)(tile.first + m) * a.stride_out + (Item(item_of(round)).query_head + group) * HEAD_DIM;
#pragma unroll
      for (int i = 0; i < HEAD_DIM / 8; i += 4) {
        // Four lanes have a pair each of four eights; afterwards each has one of the eights, which is 16 bytes.
        u32 pairs[4];
#pragma unroll
        for (int j = 0; j < 4; j++) pairs[j] = to_bf16(o[(i + j) * 4 + h * 2] * by, o[(i + j) * 4 + h * 2 + 1] * by);
        turn(pairs, t);
        if (m < tile.count) *(uint4*)(to + (i + t) * 8) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
      }
    }
  }
}
