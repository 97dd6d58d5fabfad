// y = W x for 1 to 16 rows of x, with what comes before and after fused: RMSNorm in front; RoPE and the write of keys and values,
// SwiGLU, the residual sum, or the draw of a token behind, or logits that are left as they are summed.
//
// A warp multiplies 16 rows of W with up to 8 * NT columns (the rows of x) on the tensor cores. The order of k inside a product is
// free as long as both sides agree, so a lane takes 8 consecutive k of its row: W goes from device memory to the fragments of
// mma.m16n8k16 in loads of 16 bytes, with no stop in shared memory. The warps of a block share a tile of 16 rows and split k;
// their sums meet in shared memory. DEPTH chunks per warp are always on their way: the first ones are asked for before the wait for
// the kernel before (programmatic dependent launch), because weights do not depend on it.
//
// With BITS 8, 6 or 4 the weights are codes in the order in which lanes want them (see quantized.py), with one float16 scale per row and
// 128 k: codes become bf16 without loss on their way to the tensor cores, and the scale meets the float32 sum of its group.
//
// Blocks that walk over many tiles take them in TURNS: where the kernel before has not ended everywhere, some processors get more blocks
// than others, and equal shares would leave them behind.
//
// STAGED: rows of x that are not normed go through shared memory too, each warp's share by itself, so that all of it is asked for at once
// and takes no registers. AHEAD: a block of one tile turns its codes into bf16 before the wait.
//
// Compiled once per use with: MODE, NORM, BITS, K, WARPS, DEPTH, NT, EARLY, TURNS, STAGED, AHEAD, HEAD_DIM, HEADS, KV_HEADS, PAGE.
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

#define PLAIN 0
#define RESIDUAL 1
#define QKV 2
#define SWIGLU 3
#define DRAW 4
#define LOGITS 5
constexpr int CHUNK = BITS == 16 ? 64 : 128, QUARTERS = CHUNK / 32, LOADS = BITS == 16 ? 4 : BITS / 2;
constexpr int THREADS = WARPS * 32, STEPS = K / (WARPS * CHUNK), COLS = 8 * NT, VECS = K / 8;
constexpr int XPAD = K + 32;  // the lanes of a quarter warp read two rows: 64 bytes apart they meet in no bank
static_assert(K % (WARPS * CHUNK * DEPTH) == 0, "the chunks must divide K");
constexpr bool SHARED = NORM || STAGED;
constexpr int UNITS = STEPS * CHUNK / 8, UNIT_TURNS = (UNITS + 31) / 32;  // vectors of a row that a warp multiplies
static_assert(!NORM || !STAGED, "normed rows are in shared memory anyway");
static_assert(!AHEAD || BITS < 16 && STEPS == DEPTH, "only codes that are all on their way can be turned ahead");
static_assert(NORM || !TURNS, "the barrier behind the norm shows all warps the block's second tile");
static_assert(THREADS >= 64 * NT, "one thread per pair of sums");

struct Args {
  const u16* w;          // bf16 [N, K], or codes [tiles, K / 128, 32 lanes, BITS * 8 bytes]
  const u32* scales;     // for codes: float16 pairs [tiles, K / 128, 8] of rows g and g + 8
  const u16* x;          // bf16 [rows, K], rows stride_x apart
  const u16* gamma;      // bf16 [K]: weight of the norm
  u16* out;              // bf16 [rows, N or its part], rows stride_out apart; RESIDUAL adds to it; LOGITS: float32 [rows, N]
  const int* positions;  // [rows]
  const long long* lines;  // [rows]: first key line of the row's page plus the place in it
  const float* rope;     // [rows, HEAD_DIM]: cosines, then sines
  u16* cache;
  const int* slots;
  const float* temperatures;
  const u64* seeds;
  const int* steps;
  float* values;         // [rows, blocks]: best value and its token of each block
  int* ids;
  u32* turn;             // zero between launches
  float eps;
  int rows, tiles, stride_x, stride_out, limit;  // limit: N of one half for SWIGLU
};

struct Vec { u32 v[4]; };

__device__ __forceinline__ Vec load_weights(const u16* p) {
  Vec r;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r.v[0]), "=r"(r.v[1]), "=r"(r.v[2]), "=r"(r.v[3]) : "l"(p));
  return r;
}
__device__ __forceinline__ Vec load_fresh(const u16* p) {
  Vec r;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(r.v[0]), "=r"(r.v[1]), "=r"(r.v[2]), "=r"(r.v[3]) : "l"(p));
  return r;
}
__device__ __forceinline__ void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void let_next_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ __forceinline__ float low(u32 v) { return __uint_as_float(v << 16); }
__device__ __forceinline__ float high(u32 v) { return __uint_as_float(v & 0xffff0000u); }
__device__ __forceinline__ u32 pack(float a, float b) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a));
  return r;
}
__device__ __forceinline__ u16 round_bf16(float a) { return (u16)pack(a, 0.f); }
__device__ __forceinline__ float wide(u16 a) { return __uint_as_float((u32)a << 16); }
__device__ __forceinline__ void multiply(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ u32 mix(u32 x) {  // lowbias32 (C. Wellons), as in the sampling kernel
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

// The first of the 16 weight rows of a tile that belong to sums c0, c1; those of c2, c3 start `second_half` rows further on, so
// that both halves of a rotated pair, or gate and up, meet in one thread.
__device__ __forceinline__ int first_row(int tile) {
  if (MODE == QKV) return tile / (HEAD_DIM / 16) * HEAD_DIM + tile % (HEAD_DIM / 16) * 8;
  return MODE == SWIGLU ? tile * 8 : tile * 16;
}
__device__ __forceinline__ int second_half(const Args& a) { return MODE == QKV ? HEAD_DIM / 2 : MODE == SWIGLU ? a.limit : 8; }

// Where the vector `unit` of those that a warp multiplies lies in its row.
__device__ __forceinline__ int place(int unit, int warp) { return (unit * 8 / CHUNK * WARPS + warp) * CHUNK + unit * 8 % CHUNK; }

struct Fragment { Vec v[LOADS]; u32 scale; };  // one chunk of rows g and g + 8

// Where a lane finds the chunks of a tile.
struct Source {
  const u16 *near, *far;  // bf16: rows g and g + 8
  const u32* scales;
  __device__ __forceinline__ void aim(const Args& a, int tile, int warp, int lane) {
    const int g = lane / 4, t = lane % 4;
    if (BITS == 16) {
      near = a.w + (size_t)(first_row(tile) + g) * K + warp * CHUNK + 8 * t;
      far = near + (size_t)second_half(a) * K;
    } else {
      const size_t chunk = (size_t)tile * (K / CHUNK) + warp;
      near = a.w + (chunk * 32 + lane) * LOADS * 8;
      scales = a.scales + chunk * 8 + g;
    }
  }
  __device__ __forceinline__ void fetch(Fragment& f, int step) const {
    if (BITS == 16) {
      const int at = step * WARPS * CHUNK;
      f.v[0] = load_weights(near + at);
      f.v[1] = load_weights(near + at + 32);
      f.v[2] = load_weights(far + at);
      f.v[3] = load_weights(far + at + 32);
    } else {
#pragma unroll
      for (int i = 0; i < LOADS; i++) f.v[i] = load_weights(near + (size_t)step * WARPS * 32 * LOADS * 8 + i * 8);
      asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(f.scale) : "l"(scales + step * WARPS * 8));
    }
  }
};

__device__ __forceinline__ u32 subtract_bf16(u32 a, u32 b) {
  u32 r;
  asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
// Four pairs of bf16 from eight 4-bit codes, stored as value + 8: code i of a pair lies i * 4 bits up in its half. 0x4300 is 128, whose
// last bit counts 1.
__device__ __forceinline__ void expand4(u32 codes, u32 (&pairs)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) pairs[i] = subtract_bf16((codes >> (4 * i)) & 0x000f000fu | 0x43004300u, 0x43084308u);
}
// The same from 6-bit codes, stored as value + 32: `codes` has their low bits as `expand4` has them, and the two high bits of code i of a
// pair lie i * 2 bits up in each half of `high`.
__device__ __forceinline__ void expand6(u32 codes, u32 high, u32 (&pairs)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const u32 up = i < 2 ? high << (4 - 2 * i) : high >> (2 * i - 4);
    pairs[i] = subtract_bf16((codes >> (4 * i)) & 0x000f000fu | up & 0x00300030u | 0x43004300u, 0x43204320u);
  }
}
// Two pairs of bf16 from four bytes, stored as value + 128. 0x4b000000 is 2^23, whose last bit counts 1.
__device__ __forceinline__ void expand8(u32 codes, u32 (&pairs)[2]) {
  float f[4];
#pragma unroll
  for (int i = 0; i < 4; i++) f[i] = __uint_as_float(__byte_perm(codes, 0x4b000000u, 0x7440 + i)) - 8388736.f;
  pairs[0] = pack(f[0], f[1]);
  pairs[1] = pack(f[2], f[3]);
}
// The pairs of 32 k, 8 of each row for this lane.
__device__ __forceinline__ void expand(const Fragment& f, int quarter, u32 (&near)[4], u32 (&far)[4]) {
#if BITS == 16
#pragma unroll
  for (int i = 0; i < 4; i++) near[i] = f.v[quarter].v[i], far[i] = f.v[2 + quarter].v[i];
#elif BITS == 8
  u32 two[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    expand8(f.v[quarter].v[i], two);
    near[2 * i] = two[0], near[2 * i + 1] = two[1];
    expand8(f.v[quarter].v[2 + i], two);
    far[2 * i] = two[0], far[2 * i + 1] = two[1];
  }
#elif BITS == 6
  const Vec& two = f.v[quarter / 2];
  expand6(two.v[quarter % 2 * 2], f.v[2].v[quarter], near);
  expand6(two.v[quarter % 2 * 2 + 1], f.v[2].v[quarter] >> 8, far);
#else
  expand4(f.v[quarter / 2].v[quarter % 2 * 2], near);
  expand4(f.v[quarter / 2].v[quarter % 2 * 2 + 1], far);
#endif
}
__device__ __forceinline__ float half_to_float(u16 h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}

__device__ __forceinline__ void store_qkv(const Args& a, int tile, int r, int m, float first, float second, float cos, float sin,
                                          long long line) {
  const int head = tile / (HEAD_DIM / 16), d = tile % (HEAD_DIM / 16) * 8 + r;
  if (head < HEADS + KV_HEADS) {
    const float turned = first * cos - second * sin;
    second = second * cos + first * sin;
    first = turned;
  }
  u16* target;
  if (head < HEADS)
    target = a.out + (size_t)m * a.stride_out + head * HEAD_DIM + d;
  else {
    // The lines of a value head lie KV_HEADS pages behind those of its key head: they go on where the keys end.
    target = a.cache + (line + (long long)(head - HEADS) * PAGE) * HEAD_DIM + d;
  }
  target[0] = round_bf16(first);
  target[HEAD_DIM / 2] = round_bf16(second);
}

// The next tile that no block has; called by one thread per block until it gets one past the end. The last of all these calls, of which
// there are as many as tiles, leaves zero for the next launch.
__device__ __forceinline__ int take_turn(const Args& a) { return gridDim.x + atomicInc(a.turn, a.tiles - 1); }

extern "C" __global__ void __launch_bounds__(THREADS) few_rows_linear(const Args a) {
  extern __shared__ u16 xs[];  // SHARED: [rows, XPAD], x (* gamma) in bf16
  __shared__ float sums[2][WARPS * 16][COLS];
  __shared__ float squares[COLS][WARPS];
  __shared__ int turns[2];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int r = threadIdx.x % 8, m = threadIdx.x / 8;  // the pair of sums that this thread finishes
  const bool finishes = m < a.rows;

  Fragment ring[DEPTH];
  Source source;
  int tile = blockIdx.x;
  source.aim(a, tile, warp, lane);
#pragma unroll
  for (int j = 0; j < DEPTH; j++) source.fetch(ring[j], j);
  Vec scale[(VECS + THREADS - 1) / THREADS];
  if (NORM)
#pragma unroll
    for (int i = 0; i < (VECS + THREADS - 1) / THREADS; i++)
      if (i * THREADS + threadIdx.x < VECS) scale[i] = load_weights(a.gamma + (i * THREADS + threadIdx.x) * 8);
  if (EARLY) let_next_start();
  u32 ready[AHEAD ? DEPTH : 1][QUARTERS][2][4];
  if (AHEAD) {
    u32 all = 0;
#pragma unroll
    for (int j = 0; j < DEPTH; j++)
#pragma unroll
      for (int h = 0; h < QUARTERS; h++) {
        expand(ring[j], h, ready[j][h][0], ready[j][h][1]);
#pragma unroll
        for (int i = 0; i < 8; i++) all |= ready[j][h][i / 4][i % 4];
      }
    // Never true, for the last bit of a code's bf16 is 0; without it the assembler moves the work behind the wait.
    if (all & 0x00010001u) __trap();
  }
  wait_for_previous();
  if (!EARLY) let_next_start();
  if (TURNS && threadIdx.x == 0) turns[1] = take_turn(a);

  // What the end needs, asked for now.
  float cos = 0.f, sin = 0.f, temperature = 0.f;
  long long line = 0;
  u32 noise = 0;
  if (MODE == QKV && finishes) line = a.lines[m];
  if (MODE == DRAW && finishes) {
    const int slot = a.slots[m];
    temperature = a.temperatures[slot];
    const u64 seed = a.seeds[slot];
    noise = mix(mix((u32)seed ^ mix((u32)(seed >> 32))) ^ (u32)a.steps[slot]);
  }

  const u16* rows[NT];  // lane's rows of x in the direct case, places in xs otherwise
  Vec direct[SHARED ? 1 : DEPTH][NT][QUARTERS];
#pragma unroll
  for (int i = 0; i < NT; i++) {
    const int n = min(i * 8 + g, a.rows - 1);
    rows[i] = (SHARED ? xs + n * XPAD : a.x + (size_t)n * a.stride_x) + warp * CHUNK + 8 * t;
  }
  if (NORM) {
    for (int n0 = 0; n0 < a.rows; n0 += 4) {
      const int n1 = min(n0 + 4, a.rows);
      Vec got[4][(VECS + THREADS - 1) / THREADS];
#pragma unroll
      for (int q = 0; q < 4; q++)
#pragma unroll
        for (int i = 0; i < (VECS + THREADS - 1) / THREADS; i++)
          if (n0 + q < n1 && i * THREADS + threadIdx.x < VECS)
            got[q][i] = load_fresh(a.x + (size_t)(n0 + q) * a.stride_x + (i * THREADS + threadIdx.x) * 8);
#pragma unroll
      for (int q = 0; q < 4; q++) {
        if (n0 + q >= n1) break;
        float square = 0.f;
#pragma unroll
        for (int i = 0; i < (VECS + THREADS - 1) / THREADS; i++) {
          const int at = i * THREADS + threadIdx.x;
          if (at < VECS) {
            Vec turned;
#pragma unroll
            for (int e = 0; e < 4; e++) {
              const float p = low(got[q][i].v[e]), o = high(got[q][i].v[e]);
              square += p * p + o * o;
              turned.v[e] = pack(p * low(scale[i].v[e]), o * high(scale[i].v[e]));
            }
            *(uint4*)(xs + (n0 + q) * XPAD + at * 8) = make_uint4(turned.v[0], turned.v[1], turned.v[2], turned.v[3]);
          }
        }
#pragma unroll
        for (int step = 16; step; step /= 2) square += __shfl_xor_sync(~0u, square, step);
        if (lane == 0) squares[n0 + q][warp] = square;
      }
    }
    __syncthreads();
  } else if (STAGED) {
    for (int n0 = 0; n0 < a.rows; n0 += 4) {
      Vec got[4][UNIT_TURNS];
#pragma unroll
      for (int q = 0; q < 4; q++)
#pragma unroll
        for (int i = 0; i < UNIT_TURNS; i++)
          if (n0 + q < a.rows && i * 32 + lane < UNITS)
            got[q][i] = load_fresh(a.x + (size_t)(n0 + q) * a.stride_x + place(i * 32 + lane, warp));
#pragma unroll
      for (int q = 0; q < 4; q++)
#pragma unroll
        for (int i = 0; i < UNIT_TURNS; i++)
          if (n0 + q < a.rows && i * 32 + lane < UNITS)
            *(uint4*)(xs + (n0 + q) * XPAD + place(i * 32 + lane, warp)) =
                make_uint4(got[q][i].v[0], got[q][i].v[1], got[q][i].v[2], got[q][i].v[3]);
    }
    __syncwarp();
  } else {
#pragma unroll
    for (int j = 0; j < DEPTH; j++)
#pragma unroll
      for (int i = 0; i < NT; i++)
#pragma unroll
        for (int h = 0; h < QUARTERS; h++) direct[j][i][h] = load_fresh(rows[i] + j * WARPS * CHUNK + h * 32);
  }
  float factor = 1.f;
  if (NORM && finishes) {
    float square = 0.f;
#pragma unroll
    for (int i = 0; i < WARPS; i++) square += squares[m][i];
    factor = rsqrtf(square / K + a.eps);
  }

  float best = __int_as_float(0xff800000);
  int where = 0x7fffffff, parity = 0, following = TURNS ? turns[1] : tile + gridDim.x;
  while (tile < a.tiles) {
    const bool more = !AHEAD && following < a.tiles;
    int taken = following;
    if (TURNS && more && threadIdx.x == 0) taken = take_turn(a);
    float c[NT][4] = {};
    u16 old[2] = {0, 0};
    if (MODE == RESIDUAL && finishes) {
      old[0] = a.out[(size_t)m * a.stride_out + tile * 16 + r];
      old[1] = a.out[(size_t)m * a.stride_out + tile * 16 + 8 + r];
    }
    if (MODE == QKV && finishes) {
      const int d = tile % (HEAD_DIM / 16) * 8 + r;
      cos = a.rope[m * HEAD_DIM + d];
      sin = a.rope[m * HEAD_DIM + HEAD_DIM / 2 + d];
    }
#pragma unroll 1
    for (int base = 0; base < STEPS; base += DEPTH) {
      const bool last = base + DEPTH == STEPS;
      if (last && more) source.aim(a, following, warp, lane);
#pragma unroll
      for (int j = 0; j < DEPTH; j++) {
        float group[NT][4] = {};  // codes: the sums of this chunk, before the scale
#pragma unroll
        for (int h = 0; h < QUARTERS; h++) {
          u32 p[4], q[4];
          if (AHEAD) {
#pragma unroll
            for (int i = 0; i < 4; i++) p[i] = ready[j][h][0][i], q[i] = ready[j][h][1][i];
          } else {
            expand(ring[j], h, p, q);
          }
#pragma unroll
          for (int i = 0; i < NT; i++) {
            Vec b;
            if (SHARED) {
              const uint4 four = *(const uint4*)(rows[i] + (base + j) * WARPS * CHUNK + h * 32);
              b = {four.x, four.y, four.z, four.w};
            } else {
              b = direct[j][i][h];
            }
            float(&sum)[4] = BITS == 16 ? c[i] : group[i];
            multiply(sum, p[0], q[0], p[1], q[1], b.v[0], b.v[1]);
            multiply(sum, p[2], q[2], p[3], q[3], b.v[2], b.v[3]);
          }
        }
        if (BITS != 16) {
          const float near = half_to_float((u16)ring[j].scale), far = half_to_float((u16)(ring[j].scale >> 16));
#pragma unroll
          for (int i = 0; i < NT; i++) {
            c[i][0] += near * group[i][0];
            c[i][1] += near * group[i][1];
            c[i][2] += far * group[i][2];
            c[i][3] += far * group[i][3];
          }
        }
        if (!last || more) {
          const int next = last ? j : base + DEPTH + j;
          source.fetch(ring[j], next);
          if (!SHARED)
#pragma unroll
            for (int i = 0; i < NT; i++)
#pragma unroll
              for (int h = 0; h < QUARTERS; h++) direct[j][i][h] = load_fresh(rows[i] + next * WARPS * CHUNK + h * 32);
        }
      }
    }
    // Two buffers, so that one barrier a tile is enough.
#pragma unroll
    for (int i = 0; i < NT; i++) {
      *(float2*)&sums[parity][warp * 16 + g][i * 8 + 2 * t] = make_float2(c[i][0], c[i][1]);
      *(float2*)&sums[parity][warp * 16 + 8 + g][i * 8 + 2 * t] = make_float2(c[i][2], c[i][3]);
    }
    if (TURNS && threadIdx.x == 0) turns[parity] = taken;
    __syncthreads();
    if (finishes) {
      float first = 0.f, second = 0.f;
#pragma unroll
      for (int i = 0; i < WARPS; i++) {
        first += sums[parity][i * 16 + r][m];
        second += sums[parity][i * 16 + 8 + r][m];
      }
      first *= factor;
      second *= factor;
      if (MODE == QKV) store_qkv(a, tile, r, m, first, second, cos, sin, line);
      if (MODE == SWIGLU)
        a.out[(size_t)m * a.stride_out + tile * 8 + r] = round_bf16(first / (1.f + expf(-first)) * second);
      if (MODE == PLAIN || MODE == RESIDUAL) {
        u16* target = a.out + (size_t)m * a.stride_out + tile * 16 + r;
        target[0] = round_bf16(first + wide(old[0]));
        target[8] = round_bf16(second + wide(old[1]));
      }
      if (MODE == LOGITS) {
        float* target = (float*)a.out + (size_t)m * a.stride_out + tile * 16 + r;
        target[0] = first;
        target[8] = second;
      }
      if (MODE == DRAW) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
          float value = h ? second : first;
          const int id = tile * 16 + h * 8 + r;
          if (temperature >= 1e-5f) {
            const float uniform = fminf(((float)mix(noise ^ (u32)id) + 0.5f) * 2.3283064365386963e-10f, 0.999999940395355f);
            value = value / temperature - logf(-logf(uniform));
          }
          if (value > best) best = value, where = id;
        }
      }
    }
    tile = following;
    following = TURNS ? turns[parity] : following + gridDim.x;
    parity ^= 1;
  }
  if (MODE == DRAW) {
#pragma unroll
    for (int step = 1; step < 8; step *= 2) {
      const float other = __shfl_xor_sync(~0u, best, step);
      const int there = __shfl_xor_sync(~0u, where, step);
      if (other > best || (other == best && there < where)) best = other, where = there;
    }
    if (finishes && r == 0) {
      a.values[m * gridDim.x + blockIdx.x] = best;
      a.ids[m * gridDim.x + blockIdx.x] = where;
    }
  }
}

// Codes to bf16 [N, K], for the library's products of more rows: one warp per tile and chunk.
extern "C" __global__ void __launch_bounds__(THREADS) few_rows_unpack(const Args a) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  Fragment f;
  Source source;
  source.aim(a, blockIdx.x, warp, lane);
  for (int step = 0; step < STEPS; step++) {
    source.fetch(f, step);
    const float scales[2] = {half_to_float((u16)f.scale), half_to_float((u16)(f.scale >> 16))};
#pragma unroll
    for (int h = 0; h < QUARTERS; h++) {
      u32 pairs[2][4];
      expand(f, h, pairs[0], pairs[1]);
#pragma unroll
      for (int side = 0; side < 2; side++) {
        u32 v[4];
#pragma unroll
        for (int i = 0; i < 4; i++) v[i] = pack(low(pairs[side][i]) * scales[side], high(pairs[side][i]) * scales[side]);
        u16* target = a.out + (size_t)(first_row(blockIdx.x) + g + side * second_half(a)) * K;
        *(uint4*)(target + (step * WARPS + warp) * CHUNK + h * 32 + 8 * t) = make_uint4(v[0], v[1], v[2], v[3]);
      }
    }
  }
}
