// Attention of one token per row over pages: a cluster of blocks owns one (row, KV head), its warps take turns at tiles of 16 tokens.
//
// Both products run on the tensor cores, with the heads of the group as columns of mma.m16n8k16: tokens are the rows of the scores,
// dimensions those of the sums. A lane loads 16 bytes of its tokens' keys and values straight into registers (the order of dimensions
// is free as long as all agree); values and weights are turned there, 8 x 8 at a time. 8-bit codes become float16 without loss, the
// keys' scales meet the scores and the values' the weights.
//
// Keys and values of earlier tokens are asked for before the wait for the kernel before: only the query and the newest tokens (one,
// or as many as a request has rows) come from it. The blocks of a cluster send their parts to each other's shared memory, each
// owning a share of the sums, so there is neither a second kernel nor a trip through device memory.
//
// Compiled once per use with: HEAD_DIM, GROUP, KV_HEADS, PAGE, CLUSTER, WARPS, DEPTH, KIND (0 bf16, 1 int8, 2 e4m3).
typedef unsigned int u32;
typedef unsigned short u16;

constexpr int THREADS = WARPS * 32, SIZE = GROUP * HEAD_DIM, SHARE = SIZE / CLUSTER, TILE = 16;
constexpr int BYTES = KIND == 0 ? 2 : 1, EACH = 16 / BYTES;            // of an element; elements of 16 bytes
constexpr int PIECES = HEAD_DIM * BYTES / 64;                          // 16-byte loads of a lane per key
constexpr int HEADS = GROUP + GROUP % 2, HALVES = EACH / 2;            // a lane's columns come in pairs; pairs of elements in a piece
constexpr float CODE = KIND == 0 ? 1.f : KIND == 1 ? 127.f : 448.f;    // largest code: weights times scales stay inside float16
static_assert(PAGE % TILE == 0, "a tile lies in one page");

struct Args {
  const u16* query;      // bf16 [rows, >= heads * HEAD_DIM], rows stride_query apart
  const void* cache;     // one layer
  const u16* scales;     // float16 [blocks, 2, KV_HEADS, PAGE] for 8 bit
  const int* tables;     // [slots, stride_table]
  const int* slots;      // [rows]
  const int* positions;  // [rows]
  u16* out;              // bf16 [rows, heads * HEAD_DIM], rows stride_out apart
  int stride_query, stride_out, stride_table, fresh;
  float softmax_scale;   // times log2 e
};

struct Tile {
  u32 k[2][PIECES][4], v[2][PIECES][4];  // tokens g and g + 8
  u16 scale;  // of key `lane`, or of value `lane - 16`
};

__device__ __forceinline__ void load(const void* p, u32 (&r)[4]) {
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "l"(p));
}
__device__ __forceinline__ float half_to_float(u16 h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}
// Four 8-bit codes as two pairs of float16.
__device__ __forceinline__ void to_halves(u32 codes, u32 (&pairs)[2]) {
#if KIND == 1
  const u32 raised = codes ^ 0x80808080u;  // value + 128; 0x6400 is 1024, whose last bit counts 1
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(pairs[0]) : "r"(__byte_perm(raised, 0x64646464u, 0x4140)), "r"(0x64806480u));
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(pairs[1]) : "r"(__byte_perm(raised, 0x64646464u, 0x4342)), "r"(0x64806480u));
#else
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pairs[0]) : "h"((u16)codes));
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pairs[1]) : "h"((u16)(codes >> 16)));
#endif
}
// Pair `n` of the elements of a piece.
__device__ __forceinline__ u32 pair_of(const u32 (&piece)[4], int n) {
#if KIND == 0
  return piece[n];
#else
  u32 pairs[2];
  to_halves(piece[n / 2], pairs);
  return pairs[n % 2];
#endif
}
__device__ __forceinline__ u32 pack(float low, float high) {
  u32 r;
#if KIND == 0
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
#else
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
#endif
  return r;
}
// Of an 8 x 8 matrix of 16-bit elements, a row per four lanes.
__device__ __forceinline__ u32 transpose(u32 r) {
  u32 turned;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(turned) : "r"(r));
  return turned;
}
__device__ __forceinline__ float power_of_2(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
__device__ __forceinline__ void multiply(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if KIND == 0
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#endif
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// Store to the same place of another block of the cluster.
__device__ __forceinline__ void send(float* p, int rank, float value) {
  u32 at = (u32)__cvta_generic_to_shared(p), there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(rank));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(there), "f"(value) : "memory");
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS) cluster_attention(const Args a) {
  __shared__ float parts[WARPS][SIZE], peaks[WARPS][HEADS], totals[WARPS][HEADS];
  __shared__ float inbox[CLUSTER][SHARE], inbox_peaks[CLUSTER][GROUP], inbox_totals[CLUSTER][GROUP];
  const int rank = blockIdx.x, head = blockIdx.y, row = blockIdx.z;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  // Positions are of the step's first kernel, which has ended before the kernel before this one let it start.
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");  // that all blocks are there is asked before sending
  const int length = a.positions[row] + 1;
  const int* table = a.tables + (size_t)a.slots[row] * a.stride_table;
  const int first = (rank * WARPS + warp) * TILE;
  constexpr int STRIDE = CLUSTER * WARPS * TILE;

  auto page_of = [&](int token) { return table[min(token / PAGE, a.stride_table - 1)]; };
  // The tokens of a tile from `low` to below `high`.
  auto fetch = [&](Tile& tile, int page, int base, int low, int high) {
    const size_t line = ((size_t)page * 2 * KV_HEADS + head) * PAGE + base % PAGE;
    const char* keys = (const char*)a.cache + line * HEAD_DIM * BYTES;
    const char* values = keys + (size_t)KV_HEADS * PAGE * HEAD_DIM * BYTES;
#pragma unroll
    for (int side = 0; side < 2; side++) {
      const int token = g + side * 8;
      if (base + token >= low && base + token < high)
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
          load(keys + token * HEAD_DIM * BYTES + (i * 4 + t) * 16, tile.k[side][i]);
          load(values + token * HEAD_DIM * BYTES + (i * 4 + t) * 16, tile.v[side][i]);
        }
    }
    if (KIND) {
      const int token = lane % 16;
      if (base + token >= low && base + token < high)
        asm volatile("ld.global.u16 %0, [%1];" : "=h"(tile.scale) : "l"(a.scales + line + token + lane / 16 * KV_HEADS * PAGE));
    }
  };
  Tile ring[DEPTH];
  int pages[DEPTH];  // asked for without knowing the length
#pragma unroll
  for (int j = 0; j < DEPTH; j++) pages[j] = page_of(first + j * STRIDE);
#pragma unroll
  for (int j = 0; j < DEPTH; j++) {
    ring[j] = {};
    fetch(ring[j], pages[j], first + j * STRIDE, 0, length - a.fresh);
  }
  asm volatile("griddepcontrol.wait;" ::: "memory");
#pragma unroll
  for (int j = 0; j < DEPTH; j++) fetch(ring[j], pages[j], first + j * STRIDE, length - a.fresh, length);

  u32 q[PIECES][EACH / 4][2];  // column g: head g of the group, in the order of the keys
#pragma unroll
  for (int i = 0; i < PIECES; i++)
#pragma unroll
    for (int j = 0; j < EACH / 4; j++) {
      uint2 r = make_uint2(0, 0);
      if (g < GROUP)
        r = *(const uint2*)(a.query + (size_t)row * a.stride_query + (head * GROUP + g) * HEAD_DIM + (i * 4 + t) * EACH + j * 4);
      q[i][j][0] = r.x, q[i][j][1] = r.y;
#if KIND != 0
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const float one = __uint_as_float(q[i][j][h] << 16), two = __uint_as_float(q[i][j][h] & 0xffff0000u);
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(q[i][j][h]) : "f"(two), "f"(one));
      }
#endif
    }

  float peak[2] = {-1e30f, -1e30f}, total[2] = {0.f, 0.f}, acc[HEAD_DIM / 16][4] = {};
  int next = first + DEPTH * STRIDE, page = page_of(next);
  for (int base = first; base < length; base += DEPTH * STRIDE) {
#pragma unroll
    for (int j = 0; j < DEPTH; j++) {
      const int at = base + j * STRIDE;
      if (at >= length) break;
      float s[4] = {};
#pragma unroll
      for (int i = 0; i < PIECES; i++)
#pragma unroll
        for (int m = 0; m < EACH / 4; m++)
          multiply(
              s, pair_of(ring[j].k[0][i], 2 * m), pair_of(ring[j].k[1][i], 2 * m), pair_of(ring[j].k[0][i], 2 * m + 1),
              pair_of(ring[j].k[1][i], 2 * m + 1), q[i][m][0], q[i][m][1]);
      float by[2] = {a.softmax_scale, a.softmax_scale}, value_by[2] = {1.f, 1.f};
      if (KIND) {
        const float scale = half_to_float(ring[j].scale) * (lane < 16 ? 1.f : CODE);
#pragma unroll
        for (int side = 0; side < 2; side++) {
          by[side] *= __shfl_sync(~0u, scale, g + side * 8);
          value_by[side] = __shfl_sync(~0u, scale, 16 + g + side * 8);
        }
      }
#pragma unroll
      for (int e = 0; e < 4; e++) s[e] = at + g + e / 2 * 8 < length ? s[e] * by[e / 2] : -1e30f;
      float shrink[2];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float top = fmaxf(s[h], s[2 + h]);
#pragma unroll
        for (int step = 4; step < 32; step *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
        top = fmaxf(top, peak[h]);
        shrink[h] = power_of_2(peak[h] - top);
        peak[h] = top;
        s[h] = power_of_2(s[h] - top);
        s[2 + h] = power_of_2(s[2 + h] - top);
        total[h] = total[h] * shrink[h] + s[h] + s[2 + h];
      }
      const u32 near = transpose(pack(s[0] * value_by[0], s[1] * value_by[0]));
      const u32 far = transpose(pack(s[2] * value_by[1], s[3] * value_by[1]));
#pragma unroll
      for (int m = 0; m < HEAD_DIM / 16; m++) {
        const int i = 2 * m / HALVES, n = 2 * m % HALVES;
#pragma unroll
        for (int e = 0; e < 4; e++) acc[m][e] *= shrink[e % 2];
        multiply(
            acc[m], transpose(pair_of(ring[j].v[0][i], n)), transpose(pair_of(ring[j].v[0][i], n + 1)),
            transpose(pair_of(ring[j].v[1][i], n)), transpose(pair_of(ring[j].v[1][i], n + 1)), near, far);
      }
      if (next < length) {
        if (next + TILE > length) ring[j] = {};  // tokens past the end count as zeros, not as what was there before
        fetch(ring[j], page, next, 0, length);
      }
      next += STRIDE;
      page = page_of(next);
    }
  }

  // Lanes that hold other tokens' totals, then warps, then blocks.
#pragma unroll
  for (int h = 0; h < 2; h++)
#pragma unroll
    for (int step = 4; step < 32; step *= 2) total[h] += __shfl_xor_sync(~0u, total[h], step);
  if (g == 0 && 2 * t < HEADS) {
    *(float2*)&peaks[warp][2 * t] = make_float2(peak[0], peak[1]);
    *(float2*)&totals[warp][2 * t] = make_float2(total[0], total[1]);
  }
#pragma unroll
  for (int m = 0; m < HEAD_DIM / 16; m++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      // Row g of the sums is column g of the first pair's matrix, row g + 8 of the second's.
      const int d = (2 * m / HALVES * 4 + g / 2) * EACH + (2 * m % HALVES + e / 2) * 2 + g % 2, i = 2 * t + e % 2;
      if (i < GROUP) parts[warp][i * HEAD_DIM + d] = acc[m][e];
    }
  __syncthreads();
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  for (int at = threadIdx.x; at < SIZE; at += THREADS) {
    const int i = at / HEAD_DIM;
    float top = peaks[0][i], sum = 0.f;
#pragma unroll
    for (int w = 1; w < WARPS; w++) top = fmaxf(top, peaks[w][i]);
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += parts[w][at] * power_of_2(peaks[w][i] - top);
    send(&inbox[rank][at % SHARE], at / SHARE, sum);
  }
  for (int at = threadIdx.x; at < GROUP * CLUSTER; at += THREADS) {
    const int i = at % GROUP;
    float top = peaks[0][i], all = 0.f;
#pragma unroll
    for (int w = 1; w < WARPS; w++) top = fmaxf(top, peaks[w][i]);
#pragma unroll
    for (int w = 0; w < WARPS; w++) all += totals[w][i] * power_of_2(peaks[w][i] - top);
    send(&inbox_peaks[rank][i], at / GROUP, top);
    send(&inbox_totals[rank][i], at / GROUP, all);
  }
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
  for (int own = threadIdx.x; own < SHARE; own += THREADS) {
    const int at = rank * SHARE + own, i = at / HEAD_DIM;
    float top = -1e30f, sum = 0.f, all = 0.f;
#pragma unroll
    for (int c = 0; c < CLUSTER; c++) top = fmaxf(top, inbox_peaks[c][i]);
#pragma unroll
    for (int c = 0; c < CLUSTER; c++) {
      const float by = power_of_2(inbox_peaks[c][i] - top);
      sum += inbox[c][own] * by;
      all += inbox_totals[c][i] * by;
    }
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(0.f), "f"(sum / (all * CODE)));
    a.out[(size_t)row * a.stride_out + head * SIZE + at] = (u16)packed;
  }
}
