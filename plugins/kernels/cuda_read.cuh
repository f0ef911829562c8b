// Mode read: y = M_W(q) with fixed weights. A thread block takes plan.rows queries of one head and runs them through
// the network as matmuls. W is read in place from the packed row, once per block: 4 bytes per weight with float32. A
// warp computes tiles of each layer's output, then LayerNorm and residual of whole rows.
#pragma once

#include "plugins/kernels/cuda_call.cuh"
#include "plugins/kernels/cuda_product.cuh"

namespace titans::kernels::cuda {

// A layer's W as operand B of a matmul, zero beyond its edges.
struct StoredWeights {
  const Model* model;
  const float* row;
  Field field;
  int rows;
  __device__ float operator()(int i, int k) const {
    return k < rows && i < field.columns ? load_weight(*model, row, field, k, i) : 0.0F;
  }
  template <class V>
  __device__ Word<V> word(int i, int k) const {
    return make_word<V>(*this, i, k);
  }
};

// Each thread block takes plan.rows queries of a head.
template <class In>
__global__ void __launch_bounds__(kThreads, 1) read_rows(const __grid_constant__ Call call) {
  using V = Operand<In>;
  const Model& m = call.model;
  const Group group{1, 0, nullptr, 0};
  const int rows = call.plan.rows, parts = (call.tokens + rows - 1) / rows;
  V* q = locate<V>(call, call.plan.q);
  float* result = locate<float>(call, call.plan.exchange);
  const int stride_q = stride_of(m.width, sizeof(V));
  for (int work = block_index(); work < call.streams * call.heads * parts; work += block_count()) {
    const Item item(call, work / parts);
    if (!check_item<In>(call, group, item)) continue;
    const int first = work % parts * rows, count = call.tokens - first < rows ? call.tokens - first : rows;
    const std::int64_t at = (static_cast<std::int64_t>(item.index) * call.tokens + first) * m.width;
    const In* from = static_cast<const In*>(call.q) + at;
    const float* row = row_of(call, item);
    for (int i = thread_index(); i < rows * stride_q; i += kThreads) {
      const int t = i / stride_q, j = i % stride_q;
      q[i] = to_value<V>(t < count && j < m.width ? to_float(from[t * m.width + j]) : 0.0F);
    }
    for (int i = 0; i + 1 < m.depth; ++i) {
      V* x = locate<V>(call, call.plan.x[i]);
      for (int n = thread_index(); n < rows * stride_of(m.widths[i + 1], sizeof(V)); n += kThreads) {
        x[n] = to_value<V>(0.0F);
      }
    }
    sync_block();
    for (int i = 0; i < m.depth; ++i) {
      const V* input = i == 0 ? q : locate<V>(call, call.plan.x[i - 1]);
      V* next = locate<V>(call, call.plan.x[i]);
      const int stride = stride_of(m.widths[i + 1], sizeof(V));
      multiply<V>(count, m.widths[i + 1], m.widths[i], AlongRows<V>{input, stride_of(m.widths[i], sizeof(V))},
                  StoredWeights{&m, row, m.w[i], m.widths[i]}, [&](int t, int j, float h) {
                    if (i + 1 < m.depth) {
                      next[t * stride + j] = to_value<V>(activate(m.gelu, h).value);
                    } else {
                      result[t * m.width + j] = h;
                    }
                  });
      sync_block();
    }
    const float* scale = call.norm_scale == nullptr ? nullptr : call.norm_scale + item.head * m.width;
    for (int t = warp_index(); t < count; t += kWarps) {
      finish_row(m, result + t * m.width, from + t * m.width, scale, static_cast<In*>(call.y) + at + t * m.width);
    }
    sync_block();
  }
}

}  // namespace titans::kernels::cuda
