// How queries, keys and values come into shared memory: bf16 by the tensor copy engine, as they are; 8-bit codes by way of four warps that make
// bf16 of them. The middle of prefill.cu, which includes it and has the names that are used here.

// What both ways of bringing keys and values need.
struct Shared {
  Barriers& barriers;
  Tile (&shown)[QUERIES];
  u32 keys, values, queries, raw;
  float (*scales)[2][KEYS];  // of each stage, of keys and values
};
// The queries of a round, and which they are.
__device__ __forceinline__ void load_queries(const Args& a, const Shared& at, const Item& item, const Tile& tile, int round) {
  const int buffer = round % QUERIES;
  at.shown[buffer] = tile;
  const u32 barrier = address_of(&at.barriers.full_q[buffer]);
  expect(barrier, GROUPS * QUERY_BYTES);
  for (int g = 0; g < GROUPS; g++)
    for (int slice = 0; slice < SLICES; slice++)
      load(a.query, at.queries + (buffer * GROUPS + g) * QUERY_BYTES + slice * ROWS * 128, (item.query_head + g) * HEAD_DIM + slice * 64, tile.first, barrier);
}
__device__ __forceinline__ void wait_for_queries_to_go(const Shared& at, int round) {
  if (round >= QUERIES) wait_for(address_of(&at.barriers.empty_q[round % QUERIES]), round / QUERIES - 1 & 1);
}

#if KIND == 0
__device__ __forceinline__ void produce(const Args& a, const Shared& at, int lane) {
  const int items = a.count * KV_HEADS * PARTS;
  u32 step = 0;
  for (int round = 0; item_of(round) < items; round++) {
    const Item item(item_of(round));
    const Tile tile = a.tiles[item.tile];
    const int end = tile.position + tile.count, last_page = (end - 1) / PAGE;
    const int* table = a.tables + (u64)tile.slot * a.stride_table;
    int pages = 0;  // of 32 pages, one in each lane
    wait_for_queries_to_go(at, round);
    if (lane == 0) load_queries(a, at, item, tile, round);
    for (int start = 0; start < end; start += KEYS, step++) {
      const u32 stage = step % STAGES;
      const u32 filled = min(KEYS, (end - start + BOX - 1) / BOX * BOX) * HEAD_DIM * 2;
#pragma unroll
      for (int side = 0; side < 2; side++) {
        const u32 full = address_of(side ? &at.barriers.full_v[stage] : &at.barriers.full_k[stage]);
        const u32 to = (side ? at.values : at.keys) + stage * TILE_BYTES;
        if (step >= STAGES) wait_for(address_of(side ? &at.barriers.empty_v[stage] : &at.barriers.empty_k[stage]), step / STAGES - 1 & 1);
        if (lane == 0) expect(full, filled);
#pragma unroll
        for (int box = 0; box < KEYS / BOX; box++) {
          const int token = start + box * BOX, page = token / PAGE;
          if (token >= end) break;
          if (side == 0 && token % (32 * PAGE) == 0) pages = table[min(page + lane, last_page)];
          const int found = __shfl_sync(~0u, pages, page % 32);
          const int line = ((found * 2 + side) * KV_HEADS + item.head) * PAGE + token % PAGE;
          if (lane == 0)
            for (int slice = 0; slice < SLICES; slice++)
              load(a.cache, to + slice * KEYS * 128 + box * BOX * 128, slice * 64, line, full);
        }
      }
    }
  }
}
#else
constexpr int CODE_BYTES = KEYS * HEAD_DIM, RAW_BYTES = 2 * CODE_BYTES + 4 * KEYS;  // a stage: keys, values, scales of keys, of values

// A place in the sequence of all tiles of keys of this block.
struct Cursor {
  const Args& a;
  int round = -1, start = 0, end = 0, head, slot, pages;
  u32 step = ~0u;

  __device__ __forceinline__ explicit Cursor(const Args& a) : a(a) {}
  // To the next tile of keys; false: there is none.
  __device__ __forceinline__ bool next() {
    start += KEYS, step++;
    if (start < end) return true;
    round++;
    if (item_of(round) >= a.count * KV_HEADS * PARTS) return false;
    const Item item(item_of(round));
    const Tile& tile = a.tiles[item.tile];
    head = item.head, slot = uniform(tile.slot), start = 0, end = uniform(tile.position + tile.count);
    return true;
  }
};
__device__ __forceinline__ float half_to_float(u16 h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}
// Four codes as two pairs of bf16, exactly.
__device__ __forceinline__ void to_pairs(u32 codes, u32& low, u32& high) {
#if KIND == 1
  // 0x4300 is 128, whose last bit counts 1; the sign takes 256 away instead of 128.
  const u32 near = __byte_perm(codes, 0x43434343u, 0x4140), far = __byte_perm(codes, 0x43434343u, 0x4342);
  asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(low) : "r"(near & 0xff7fff7fu), "r"(near & 0xff80ff80u));
  asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(high) : "r"(far & 0xff7fff7fu), "r"(far & 0xff80ff80u));
#else
  // Exponents and mantissas where bf16 has them, whose exponents begin 120 lower: 0x7b80 is 2^120.
  const u32 near = __byte_perm(codes, 0, 0x1404), far = __byte_perm(codes, 0, 0x3424);
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(low) : "r"(near >> 4 & 0x07f007f0u | near & 0x80008000u), "r"(0x7b807b80u));
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(high) : "r"(far >> 4 & 0x07f007f0u | far & 0x80008000u), "r"(0x7b807b80u));
#endif
}
// 8-bit codes come as they are; four warps make bf16 of them, once for all heads of the block. Rows past the end become zeros.
__device__ __forceinline__ void convert(const Args& a, const Shared& at, int warp, int lane) {
  auto fetch = [&](Cursor& to) {  // codes and scales of a tile into its stage
    const u32 full = address_of(&at.barriers.full_raw[to.step % RAW]), raw = at.raw + to.step % RAW * RAW_BYTES;
    const int* table = a.tables + (u64)to.slot * a.stride_table;
    if (to.start % (32 * PAGE) == 0) to.pages = table[min(to.start / PAGE + lane, (to.end - 1) / PAGE)];
    if (lane == 0) expect(full, min(KEYS, (to.end - to.start + BOX - 1) / BOX * BOX) * (HEAD_DIM + 2) * 2);
#pragma unroll
    for (int box = 0; box < KEYS / BOX; box++) {
      const int token = to.start + box * BOX;
      if (token >= to.end) break;
      const int found = __shfl_sync(~0u, to.pages, token / PAGE % 32);
      for (int side = 0; side < 2; side++) {
        const int line = ((found * 2 + side) * KV_HEADS + to.head) * PAGE + token % PAGE;
        if (lane > 0) continue;
        load(a.cache, raw + side * CODE_BYTES + box * BOX * HEAD_DIM, 0, line, full);
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                     :: "r"(raw + 2 * CODE_BYTES + (side * KEYS + box * BOX) * 2), "l"(a.scales + line), "r"(BOX * 2), "r"(full) : "memory");
      }
    }
  };
  const int thread = warp * 32 + lane;
  Cursor ahead(a), now(a);
  bool more = true;
  if (warp == 0)
    for (int i = 0; i < RAW; i++)
      if ((more = more && ahead.next())) fetch(ahead);
  while (now.next()) {
    if (warp == 0 && now.start == 0) {
      wait_for_queries_to_go(at, now.round);
      const Item item(item_of(now.round));
      if (lane == 0) load_queries(a, at, item, a.tiles[item.tile], now.round);
    }
    const u32 stage = now.step % STAGES, raw = at.raw + now.step % RAW * RAW_BYTES;
    const int valid = now.end - now.start;
    wait_for(address_of(&at.barriers.full_raw[now.step % RAW]), now.step / RAW & 1);
#pragma unroll
    for (int side = 0; side < 2; side++) {
      const u32 to = (side ? at.values : at.keys) + stage * TILE_BYTES;
      if (now.step >= STAGES) wait_for(address_of(side ? &at.barriers.empty_v[stage] : &at.barriers.empty_k[stage]), now.step / STAGES - 1 & 1);
      for (int i = thread; i < KEYS; i += 128) {
        u16 scale;
        asm volatile("ld.shared.u16 %0, [%1];" : "=h"(scale) : "r"(raw + 2 * CODE_BYTES + (side * KEYS + i) * 2) : "memory");
        at.scales[stage][side][i] = i < valid ? half_to_float(scale) : 0.f;
      }
      constexpr int PIECES = HEAD_DIM / 16;  // of 16 codes
#pragma unroll 4
      for (int i = thread; i < KEYS * PIECES; i += 128) {
        const int row = i / PIECES, piece = i % PIECES * 2;
        u32 codes[4], pairs[8];
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(codes[0]), "=r"(codes[1]), "=r"(codes[2]), "=r"(codes[3]) : "r"(raw + side * CODE_BYTES + i * 16) : "memory");
#pragma unroll
        for (int j = 0; j < 4; j++) to_pairs(row < valid ? codes[j] : 0, pairs[2 * j], pairs[2 * j + 1]);
#pragma unroll
        for (int j = 0; j < 2; j++)
          asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};"
                       :: "r"(to + piece / 8 * KEYS * 128 + row * 128 + (((piece + j) % 8 ^ row % 8) << 4)), "r"(pairs[4 * j]), "r"(pairs[4 * j + 1]),
                          "r"(pairs[4 * j + 2]), "r"(pairs[4 * j + 3]) : "memory");
      }
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      __syncwarp();
      if (lane == 0) arrive(address_of(side ? &at.barriers.full_v[stage] : &at.barriers.full_k[stage]));
    }
    asm volatile("bar.sync 15, 128;" ::: "memory");  // all have read the codes
    if (warp == 0 && (more = more && ahead.next())) fetch(ahead);
  }
}
#endif
