// What kernels for Hopper share: barriers in shared memory, the tensor copy engine, and wgmma on bf16 tiles. Included by sources of folders beside it.
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

struct alignas(64) Map { char bytes[128]; };  // a CUtensorMap

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

#define OF4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define OF16(i) OF4(i), OF4(i + 4), OF4(i + 8), OF4(i + 12)
#define TO32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TO64 \
  TO32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
// d += a tile of 64 x 16 times one of 16 x 64 or 16 x 128, both in shared memory, where what is summed over is contiguous; `keep` = 0: d = their product.
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
// silu(gate) * up. By these instructions wherever float32 sums are at hand: rows must be the same with and without adapters.
__device__ __forceinline__ float swiglu(float gate, float up) { return __fdividef(gate, 1.f + __expf(-gate)) * up; }
