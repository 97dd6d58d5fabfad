// Attention of one token per row for a few rows: a cluster of blocks owns one (row, KV head), each block a range of its tokens.
//
// A lane reads 8 dimensions of a token, so HEAD_DIM / 8 lanes share a token and sum its products by shuffles; at these sizes plain
// multiply-adds are free. Keys and values of earlier tokens are asked for before the wait for the kernel before: only the query
// and the newest token come from it. The blocks of a cluster send their parts to each other's shared memory, each owning a share of
// the sums, so there is neither a second kernel nor a trip through device memory.
//
// Compiled once per use with: HEAD_DIM, GROUP, KV_HEADS, PAGE, CLUSTER, WARPS, UNROLL, KIND (0 bf16, 1 int8, 2 e4m3).
typedef unsigned int u32;
typedef unsigned short u16;

constexpr int LANES = HEAD_DIM / 8, TOKENS = 32 / LANES, THREADS = WARPS * 32, SIZE = GROUP * HEAD_DIM;
constexpr int BLOCK = WARPS * TOKENS, STRIDE = BLOCK * CLUSTER, SHARE = SIZE / CLUSTER, WORDS = KIND == 0 ? 4 : 2;

struct Args {
  const u16* query;      // bf16 [rows, >= heads * HEAD_DIM], rows stride_query apart
  const void* cache;     // one layer
  const u16* scales;     // float16 [blocks, 2, KV_HEADS, PAGE] for 8 bit
  const int* tables;     // [slots, stride_table]
  const int* slots;      // [rows]
  const int* positions;  // [rows]
  u16* out;              // bf16 [rows, heads * HEAD_DIM], rows stride_out apart
  int stride_query, stride_out, stride_table;
  float softmax_scale;   // times log2 e
};

struct Piece { u32 k[WORDS], v[WORDS]; u16 ks, vs; };

__device__ __forceinline__ void load_piece(const void* p, u32 (&r)[WORDS]) {
#if KIND == 0
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "l"(p));
#else
  asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "l"(p));
#endif
}
__device__ __forceinline__ float half_to_float(u16 h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}
__device__ __forceinline__ void widen(const u32 (&r)[WORDS], float (&f)[8]) {
#pragma unroll
  for (int i = 0; i < WORDS; i++) {
#if KIND == 0
    f[2 * i] = __uint_as_float(r[i] << 16);
    f[2 * i + 1] = __uint_as_float(r[i] & 0xffff0000u);
#elif KIND == 1
#pragma unroll
    for (int b = 0; b < 4; b++) f[4 * i + b] = (float)((int)(r[i] << (24 - 8 * b)) >> 24);
#else
#pragma unroll
    for (int h = 0; h < 2; h++) {
      u32 pair;
      asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"((u16)(r[i] >> (16 * h))));
      f[4 * i + 2 * h] = half_to_float((u16)pair);
      f[4 * i + 2 * h + 1] = half_to_float((u16)(pair >> 16));
    }
#endif
  }
}
// Store to the same place of another block of the cluster.
__device__ __forceinline__ void send(float* p, int rank, float value) {
  u32 at = (u32)__cvta_generic_to_shared(p), there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(rank));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(there), "f"(value) : "memory");
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS) few_rows_attention(const Args a) {
  __shared__ float parts[WARPS][SIZE], peaks[WARPS][GROUP], totals[WARPS][GROUP];
  __shared__ float inbox[CLUSTER][SHARE], inbox_peaks[CLUSTER][GROUP], inbox_totals[CLUSTER][GROUP];
  const int rank = blockIdx.x, head = blockIdx.y, row = blockIdx.z;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = lane % LANES;
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  // Positions are of the step's first kernel, which has ended before the kernel before this one let it start.
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");  // that all blocks are there is asked before sending
  const int length = a.positions[row] + 1;
  const int* table = a.tables + (size_t)a.slots[row] * a.stride_table;
  const int first = rank * BLOCK + warp * TOKENS + lane / LANES;  // this lane's tokens are STRIDE apart

  Piece ring[UNROLL];
  auto page_of = [&](int token) { return table[min(token / PAGE, a.stride_table - 1)]; };
  auto fetch = [&](Piece& p, int page, int token) {
    const size_t line = ((size_t)page * 2 * KV_HEADS + head) * PAGE + token % PAGE;
    const char* at = (const char*)a.cache + (line * HEAD_DIM + part * 8) * (KIND == 0 ? 2 : 1);
    load_piece(at, p.k);
    load_piece(at + (size_t)KV_HEADS * PAGE * HEAD_DIM * (KIND == 0 ? 2 : 1), p.v);
    if (KIND) {
      asm volatile("ld.global.u16 %0, [%1];" : "=h"(p.ks) : "l"(a.scales + line));
      asm volatile("ld.global.u16 %0, [%1];" : "=h"(p.vs) : "l"(a.scales + line + KV_HEADS * PAGE));
    }
  };
  int pages[UNROLL];  // asked for without knowing the length
#pragma unroll
  for (int u = 0; u < UNROLL; u++) pages[u] = page_of(first + u * STRIDE);
#pragma unroll
  for (int u = 0; u < UNROLL; u++) {
    ring[u] = {};
    if (first + u * STRIDE < length - 1) fetch(ring[u], pages[u], first + u * STRIDE);
  }
  asm volatile("griddepcontrol.wait;" ::: "memory");
#pragma unroll
  for (int u = 0; u < UNROLL; u++)
    if (first + u * STRIDE == length - 1) fetch(ring[u], pages[u], first + u * STRIDE);
  float q[GROUP][8];
#pragma unroll
  for (int i = 0; i < GROUP; i++) {
    const uint4 r = *(const uint4*)(a.query + (size_t)row * a.stride_query + (head * GROUP + i) * HEAD_DIM + part * 8);
    const u32 words[4] = {r.x, r.y, r.z, r.w};
#pragma unroll
    for (int e = 0; e < 4; e++) {
      q[i][2 * e] = __uint_as_float(words[e] << 16) * a.softmax_scale;
      q[i][2 * e + 1] = __uint_as_float(words[e] & 0xffff0000u) * a.softmax_scale;
    }
  }

  float peak[GROUP], total[GROUP], acc[GROUP][8];
#pragma unroll
  for (int i = 0; i < GROUP; i++) {
    peak[i] = -1e30f;
    total[i] = 0.f;
#pragma unroll
    for (int d = 0; d < 8; d++) acc[i][d] = 0.f;
  }
  for (int base = first; base - first + rank * BLOCK < length; base += UNROLL * STRIDE) {
    float score[UNROLL][GROUP];
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      float k[8];
      widen(ring[u].k, k);
      const float by = KIND ? half_to_float(ring[u].ks) : 1.f;
#pragma unroll
      for (int i = 0; i < GROUP; i++) {
        float s = 0.f;
#pragma unroll
        for (int d = 0; d < 8; d++) s += q[i][d] * k[d];
#pragma unroll
        for (int step = 1; step < LANES; step *= 2) s += __shfl_xor_sync(~0u, s, step);
        score[u][i] = base + u * STRIDE < length ? s * by : -1e30f;
      }
    }
#pragma unroll
    for (int i = 0; i < GROUP; i++) {
      float top = peak[i];
#pragma unroll
      for (int u = 0; u < UNROLL; u++) top = fmaxf(top, score[u][i]);
      const float shrink = exp2f(peak[i] - top);
      peak[i] = top;
      total[i] *= shrink;
#pragma unroll
      for (int d = 0; d < 8; d++) acc[i][d] *= shrink;
    }
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      float v[8];
      widen(ring[u].v, v);
      const float by = KIND ? half_to_float(ring[u].vs) : 1.f;
      const bool inside = base + u * STRIDE < length;
#pragma unroll
      for (int i = 0; i < GROUP; i++) {
        const float weight = inside ? exp2f(score[u][i] - peak[i]) : 0.f;
        total[i] += weight;
#pragma unroll
        for (int d = 0; d < 8; d++) acc[i][d] += weight * by * v[d];
      }
      const int token = base + (UNROLL + u) * STRIDE;
      if (token < length) fetch(ring[u], page_of(token), token);
      else ring[u] = {};
    }
  }

  // Lanes that hold the same dimensions of other tokens, then warps, then blocks.
#pragma unroll
  for (int i = 0; i < GROUP; i++) {
    float top = peak[i];
#pragma unroll
    for (int step = LANES; step < 32; step *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
    const float shrink = exp2f(peak[i] - top);
    total[i] *= shrink;
#pragma unroll
    for (int d = 0; d < 8; d++) acc[i][d] *= shrink;
#pragma unroll
    for (int step = LANES; step < 32; step *= 2) {
      total[i] += __shfl_xor_sync(~0u, total[i], step);
#pragma unroll
      for (int d = 0; d < 8; d++) acc[i][d] += __shfl_xor_sync(~0u, acc[i][d], step);
    }
    if (lane < LANES) {
#pragma unroll
      for (int d = 0; d < 8; d++) parts[warp][i * HEAD_DIM + part * 8 + d] = acc[i][d];
      peaks[warp][i] = top;
      totals[warp][i] = total[i];
    }
  }
  __syncthreads();
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  for (int at = threadIdx.x; at < SIZE; at += THREADS) {
    const int i = at / HEAD_DIM;
    float top = peaks[0][i], sum = 0.f;
#pragma unroll
    for (int w = 1; w < WARPS; w++) top = fmaxf(top, peaks[w][i]);
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += parts[w][at] * exp2f(peaks[w][i] - top);
    send(&inbox[rank][at % SHARE], at / SHARE, sum);
  }
  for (int at = threadIdx.x; at < GROUP * CLUSTER; at += THREADS) {
    const int i = at % GROUP;
    float top = peaks[0][i], all = 0.f;
#pragma unroll
    for (int w = 1; w < WARPS; w++) top = fmaxf(top, peaks[w][i]);
#pragma unroll
    for (int w = 0; w < WARPS; w++) all += totals[w][i] * exp2f(peaks[w][i] - top);
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
      const float by = exp2f(inbox_peaks[c][i] - top);
      sum += inbox[c][own] * by;
      all += inbox_totals[c][i] * by;
    }
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(0.f), "f"(sum / all));
    a.out[(size_t)row * a.stride_out + head * SIZE + at] = (u16)packed;
  }
}
