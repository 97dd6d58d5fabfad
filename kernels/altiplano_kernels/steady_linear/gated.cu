// silu(gate) * up of float32 sums, as in the epilogue of tile_linear/linear.cu: rows that an adapter has nothing to add to must be what they are
// in a step without adapters.
#include "../hopper.cuh"

struct Args {
  const float* sums;  // [rows, 2 * columns], gate first
  u16* out;           // bf16 [rows, columns]
  int columns;
};

// A block has 1,024 columns of a row.
extern "C" __global__ void __launch_bounds__(256) gated(const Args a) {
  const float* gate = a.sums + (size_t)blockIdx.y * 2 * a.columns;
  for (int at = blockIdx.x * 1024 + threadIdx.x; at < min(a.columns, (int)(blockIdx.x + 1) * 1024); at += 256) {
    u16 rounded;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded) : "f"(swiglu(gate[at], gate[a.columns + at])));
    a.out[(size_t)blockIdx.y * a.columns + at] = rounded;
  }
}
