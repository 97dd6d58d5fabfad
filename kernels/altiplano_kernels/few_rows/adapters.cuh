// What adapters add to the sums of linear.cu: gain * sum + up (down x) for the rows that have one, and nothing to the others. down x is
// what shrink.py has left, in SPLITS parts, of rows before their norm's factor; up and gain have a line for each column of the output.
//
// What is added to a row depends on nothing but the row and its adapter, in one order for all plans. Compiled with RANK (the pool's, a
// multiple of 16), MODULES, SPLITS, BLOCKS (how many of them a processor shall hold) and ONE (whether a block has one tile: then no
// weights are on their way at its end, and their registers are free); without them there is nothing here.
constexpr int TOGETHER = ONE ? 2 : 1;  // eights of a line on their way at once
constexpr int WIDE = MODULES * RANK, LINE = WIDE + 4;  // floats of a row's down x; in shared memory rows begin in different banks

__device__ __forceinline__ void copy(float* to, const float* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
__device__ __forceinline__ Vec load_shared_weights(const u16* p) {  // rows of other warps may have the same adapter
  Vec r;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(r.v[0]), "=r"(r.v[1]), "=r"(r.v[2]), "=r"(r.v[3]) : "l"(p));
  return r;
}
__device__ __forceinline__ void prefetch(const u16* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Calls use(m, w) for each four of down x, number w of row m, that are this thread's: of rows that have an adapter, and as far as
// `add_adapter` reads, which is in eights; what lies further behind the adapter's rank nobody has written.
template <class Use>
__device__ __forceinline__ void each_four(const Args& a, const Use& use) {
#pragma unroll 1
  for (int at = threadIdx.x * 4; at < a.rows * WIDE; at += THREADS * 4) {
    const int m = at / WIDE, w = at % WIDE;
    if (w % RANK / 8 * 8 < a.owners[m].rank) use(m, w);
  }
}
// Starts the copy of down x to shared memory, [SPLITS, rows, LINE], past the registers, which hold the weights on their way.
__device__ __forceinline__ void fetch_shrunk(const Args& a, float* shrunk) {
  each_four(a, [&](int m, int w) {
#pragma unroll
    for (int i = 0; i < SPLITS; i++) copy(shrunk + (i * a.rows + m) * LINE + w, a.parts + (size_t)i * a.stride_part + m * WIDE + w);
  });
}
// Adds the parts up in the place of the first; each thread those that it has fetched, so the barrier behind is enough.
__device__ __forceinline__ void add_parts(const Args& a, float* shrunk) {
  wait_for_copies();
  if (SPLITS == 1) return;
  each_four(a, [&](int m, int w) {
    float4* to = (float4*)(shrunk + m * LINE + w);
    float4 sum = *to;
#pragma unroll 1
    for (int i = 1; i < SPLITS; i++) {
      const float4 more = *(const float4*)(shrunk + (i * a.rows + m) * LINE + w);
      sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
    }
    *to = sum;
  });
}

// An adapter's line for the first of the two columns that a thread finishes; the other one is `second_half` further on.
__device__ __forceinline__ size_t line_of(const Args& a, const Owner& owner, int column) {
  return (size_t)(owner.adapter - 1) * a.outputs + column;
}
// Asks for what `add_adapter` will read, as far as the L2 cache: then the end of a sum is no trip to device memory, and until then no
// register is taken from the weights on their way.
__device__ __forceinline__ void ask_lines(const Args& a, int m, int column) {
  const Owner owner = a.owners[m];
  if (!owner.adapter) return;
  const size_t near = line_of(a, owner, column), far = near + second_half(a);
  prefetch(a.gain + near), prefetch(a.gain + far);
  for (int e = 0; e < owner.rank; e += 64) prefetch(a.up + near * RANK + e), prefetch(a.up + far * RANK + e);
}
__device__ __forceinline__ float add_products(float sum, const Vec& up, const float* shrunk) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const float4 x = *(const float4*)(shrunk + 4 * h);
    sum = fmaf(low(up.v[2 * h]), x.x, sum);
    sum = fmaf(high(up.v[2 * h]), x.y, sum);
    sum = fmaf(low(up.v[2 * h + 1]), x.z, sum);
    sum = fmaf(high(up.v[2 * h + 1]), x.w, sum);
  }
  return sum;
}
// Makes the two sums of row m, which have the row's factor already, those of its adapter; without one they stay.
__device__ __forceinline__ void add_adapter(const Args& a, int m, int column, const float* shrunk, float factor, float& first,
                                            float& second) {
  const Owner owner = a.owners[m];
  if (!owner.adapter) return;
  const size_t near = line_of(a, owner, column), far = near + second_half(a);
  const float gains[2] = {wide(a.gain[near]), wide(a.gain[far])};
  auto of_module = [&](int n) { return shrunk + m * LINE + ((n >= a.first_end) + (n >= a.second_end)) * RANK; };
  const float *x = of_module(column), *y = of_module(column + second_half(a));
  float p = 0.f, q = 0.f;
#pragma unroll TOGETHER
  for (int e = 0; e < owner.rank; e += 8) {
    p = add_products(p, load_shared_weights(a.up + near * RANK + e), x + e);
    q = add_products(q, load_shared_weights(a.up + far * RANK + e), y + e);
  }
  first = fmaf(gains[0], first, factor * p);
  second = fmaf(gains[1], second, factor * q);
}
