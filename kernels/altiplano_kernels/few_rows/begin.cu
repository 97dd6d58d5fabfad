// The start of a step for a few rows: from slots to what the layers read, gathered once, so that no layer follows pointers.
//
// Compiled once per use with: HIDDEN, HEAD_DIM, KV_HEADS, PAGE.
typedef unsigned short u16;

struct Args {
  const int* slots;      // [rows]
  const int* tokens;     // [slots]
  const int* positions_of;  // [slots]
  const int* tables;     // [slots, stride_table]
  const u16* embedding;  // bf16 [vocab, HIDDEN]
  const float* cos_sin;  // [positions, HEAD_DIM]
  u16* residual;         // bf16 [rows, HIDDEN]
  int* positions;        // [rows]
  long long* lines;      // [rows]
  float* rope;           // [rows, HEAD_DIM]
  int stride_table;
};

extern "C" __global__ void __launch_bounds__(256) few_rows_begin(const Args a) {
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  const int row = blockIdx.x, slot = a.slots[row];
  const int position = a.positions_of[slot], token = a.tokens[slot];
  const uint4* from = (const uint4*)(a.embedding + (size_t)token * HIDDEN);
  for (int i = threadIdx.x; i < HIDDEN / 8; i += 256) ((uint4*)(a.residual + (size_t)row * HIDDEN))[i] = from[i];
  if (threadIdx.x < HEAD_DIM) a.rope[row * HEAD_DIM + threadIdx.x] = a.cos_sin[(size_t)position * HEAD_DIM + threadIdx.x];
  if (threadIdx.x == 0) {
    const long long page = a.tables[(size_t)slot * a.stride_table + position / PAGE];
    a.positions[row] = position;
    a.lines[row] = page * 2 * KV_HEADS * PAGE + position % PAGE;
  }
}
