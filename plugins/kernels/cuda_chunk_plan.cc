#include "plugins/kernels/cuda_chunk_plan.h"

#include <algorithm>

namespace titans::kernels::cuda {
namespace {

constexpr std::size_t kAlignment = 16;
constexpr int kFloat = static_cast<int>(sizeof(float)), kThreadsOfBlock = 256, kWarpsOfBlock = kThreadsOfBlock / 32;

// Hands out places: in shared memory as long as there is room, then in the workspace.
class Places {
 public:
  Places(ChunkPlan& plan, std::size_t budget) : plan_(plan), budget_(budget) {}

  void put(Place& place, std::int64_t floats) {
    const std::size_t bytes =
        (static_cast<std::size_t>(floats) * sizeof(float) + kAlignment - 1) / kAlignment * kAlignment;
    place.shared = plan_.shared_bytes + bytes <= budget_;
    if (place.shared) {
      place.offset = plan_.shared_bytes;
      plan_.shared_bytes += static_cast<std::uint32_t>(bytes);
    } else {
      place.offset = static_cast<std::uint32_t>(plan_.workspace_bytes);
      plan_.workspace_bytes += bytes;
    }
  }

 private:
  ChunkPlan& plan_;
  std::size_t budget_;
};

}  // namespace

ChunkModel make_chunk_model(const ChunkConfiguration& c) {
  const ChunkRowLayout layout(c);
  ChunkModel m{};
  static_cast<Codec&>(m) = make_codec(c);
  const auto whole = [](std::int64_t value) { return static_cast<int>(value); };
  m.depth = c.depth;
  m.tensors = c.tensors();
  m.chunk = whole(c.chunk_size);
  m.width = whole(c.widths[0]);
  m.keys_per_token = whole(c.keys_per_token);
  for (int i = 0; i <= c.depth; ++i) {
    m.widths[i] = whole(c.widths[static_cast<std::size_t>(i)]);
    m.widest = std::max(m.widest, m.widths[i]);
  }
  for (int p = 0; p < m.tensors; ++p) {
    const auto tensor = static_cast<std::size_t>(p);
    m.w[p] = make_field(c, p, layout.w[tensor]);
    m.g[p] = make_field(c, p, layout.g[tensor]);
    m.s[p] = make_field(c, p, layout.s[tensor]);
    m.ew[p] = make_field(c, p, layout.ew[tensor]);
    m.es[p] = make_field(c, p, layout.es[tensor]);
    m.rows[p] = whole(c.rows(p));
    m.offsets[p + 1] = m.offsets[p] + whole(c.elements(p));
    m.weight_words += whole(c.words(p));
  }
  m.k = whole(layout.k);
  m.v = whole(layout.v);
  m.theta = whole(layout.theta);
  m.chunk_updates = whole(layout.chunk_updates);
  m.row = whole(layout.size);
  m.orthogonalise = whole(c.orthogonalise);
  m.batch_size = c.counts_batch() ? c.batch_size : 0;
  m.period = c.period();
  m.loss_scale = c.loss_scale;
  m.grad_clamp = c.grad_clamp;
  m.aligned = c.schedule == Schedule::kAligned;
  m.gelu = c.activation == Activation::kGelu;
  m.residual = c.residual;
  m.layer_norm = c.layer_norm;
  m.fast_norm = c.fast_norm();
  m.momentum = c.momentum;
  m.keeps_point = c.keeps_point();
  m.lookahead = c.lookahead;
  m.direct = c.memory_dtype == MemoryDtype::kFloat32;
  return m;
}

ChunkPlan make_chunk_plan(const ChunkConfiguration& c, const CudaDevice& device) {
  ChunkPlan plan;
  Places places(plan, device.shared_bytes);
  std::int64_t widest = c.widths[0], large = 0, small = 0, largest = 0;
  for (int i = 0; i < c.depth; ++i) {
    widest = std::max(widest, c.out(i));
    large = std::max(large, std::max(c.in(i), c.out(i)));
    small = std::max(small, std::min(c.in(i), c.out(i)));
    largest = std::max(largest, c.weights(i));
  }
  const auto stride = [](std::int64_t columns) { return stride_of(static_cast<int>(columns), kFloat); };
  places.put(plan.sums, kThreadsOfBlock);
  for (Place& vector : plan.vectors) places.put(vector, widest);
  places.put(plan.scale, c.widths[0]);
  if (c.fast_norm()) places.put(plan.gamma, kWarpsOfBlock * c.widths[0]);
  if (c.orthogonalise > 0) {
    const std::int64_t iterate = std::int64_t{pad(static_cast<int>(large))} * stride(small);
    const std::int64_t square = std::int64_t{pad(static_cast<int>(small))} * stride(small);
    places.put(plan.iterate[0], iterate);
    for (Place& each : plan.square) places.put(each, square);
    places.put(plan.iterate[1], iterate);
  }
  for (Place& x : plan.x) places.put(x, std::int64_t{kMostRows} * stride(widest));
  for (int i = 0; i < c.depth; ++i) {
    if (i > 0) places.put(plan.layer_input[i], c.keys() * stride(c.in(i)));
    if (i + 1 < c.depth) places.put(plan.derivative[i], c.keys() * stride(c.out(i)));
    places.put(plan.output_grad[i], c.keys() * stride(c.out(i)));
  }
  const std::int64_t all = c.all_elements();
  for (Place* copy : {&plan.point, &plan.weights_next, &plan.surprise_next}) places.put(*copy, all);
  if (c.memory_dtype != MemoryDtype::kFloat32) {
    for (Place* copy : {&plan.weights, &plan.surprise}) places.put(*copy, all);
  }
  if (c.orthogonalise > 0) places.put(plan.update, largest);
  return plan;
}

int chunk_blocks(const CudaDevice& device, std::int64_t work) {
  return static_cast<int>(std::min<std::int64_t>(work, std::max(device.multiprocessors, 1)));
}

std::string describe(const ChunkPlan& plan) {
  const auto where = [](const Place& place) { return std::string(place.shared ? "shared" : "workspace"); };
  return "blocks 1, iterate " + where(plan.iterate[0]) + " and " + where(plan.iterate[1]) + ", squares " +
         where(plan.square[1]) + ", shared " + std::to_string(plan.shared_bytes) + " bytes, workspace " +
         std::to_string(plan.workspace_bytes) + " bytes a block";
}

}  // namespace titans::kernels::cuda
