// What attention.cpp, attention_short.cpp and attention_bytes.cpp export, each over an `attention` of its own; included behind it.
#pragma once

namespace {

template <typename T>
int run(const void* q, const void* k, const void* v, void* out, const int64_t* sizes, const int64_t* by, float scale, int threads,
        const QdmCodes* codes) {
  const Shape shape{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
  const auto view = [](const void* at, const int64_t* by) { return View<const T>{static_cast<const T*>(at), {by[0], by[1], by[2]}}; };
  const Output<T> to({static_cast<T*>(out), {by[9], by[10], by[11]}}, codes, shape.width);
  return attention<T>(view(q, by), view(k, by + 3), view(v, by + 6), to, shape, scale, threads);
}

}  // namespace

// sizes: batch, heads, queries, keys, width; by: distances of batch, head and row, in values, of q, k, v and out.
// codes: null, or how outputs become codes. Returns 1 = no memory, 2 = not for these values.
extern "C" int qdm_attention_f32(const void* q, const void* k, const void* v, void* out, const int64_t* sizes, const int64_t* by,
                                 float scale, int threads, const QdmCodes* codes) {
  return run<float>(q, k, v, out, sizes, by, scale, threads, codes);
}

extern "C" int qdm_attention_bf16(const void* q, const void* k, const void* v, void* out, const int64_t* sizes, const int64_t* by,
                                  float scale, int threads, const QdmCodes* codes) {
  return run<half>(q, k, v, out, sizes, by, scale, threads, codes);
}
