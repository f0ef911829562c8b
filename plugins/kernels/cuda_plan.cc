#include "plugins/kernels/cuda_plan.h"

#include <algorithm>
#include <array>
#include <limits>

namespace titans::kernels::cuda {
namespace {

constexpr std::size_t kAlignment = 128;
constexpr std::size_t kWorkspaceAlignment = 256;
constexpr int kFirstClusterSm = 90;
constexpr int kBestFitness = 2;

constexpr std::size_t round_up(std::size_t size, std::size_t unit) { return (size + unit - 1) / unit * unit; }

// Allocates shared memory until it is used up, then workspace. Earlier requests get shared memory first.
class Placer {
 public:
  explicit Placer(std::size_t shared_bytes) : left_(shared_bytes / kAlignment * kAlignment) {}

  Place place(std::size_t bytes) {
    bytes = round_up(bytes, kAlignment);
    std::size_t& used = bytes <= left_ - shared_ ? shared_ : workspace_;
    const Place place{static_cast<std::uint32_t>(used), &used == &shared_};
    used += bytes;
    return place;
  }
  Place place_in_workspace(std::size_t bytes) {
    const Place place{static_cast<std::uint32_t>(workspace_), false};
    workspace_ += round_up(bytes, kAlignment);
    return place;
  }
  std::size_t shared() const { return shared_; }
  std::size_t workspace() const { return workspace_; }

 private:
  std::size_t left_, shared_ = 0, workspace_ = 0;
};

std::size_t matrix(int rows, int columns, int element_bytes) {
  return static_cast<std::size_t>(pad(rows)) * static_cast<std::size_t>(stride_of(columns, element_bytes)) *
         static_cast<std::size_t>(element_bytes);
}

std::size_t floats(int count) { return static_cast<std::size_t>(count) * sizeof(float); }

// The numbers of rows and of columns of layer i that one block holds.
int held_in(const Model& m, const Plan& plan, int i) { return i == m.depth - 1 ? plan.share : m.widths[i]; }
int held_out(const Model& m, const Plan& plan, int i) { return i == m.depth - 2 ? plan.share : m.widths[i + 1]; }

int widest(const Model& m) { return *std::max_element(m.widths, m.widths + m.depth + 1); }

// Other blocks of the group read the exchange area. Only a cluster can read shared memory.
Place place_exchange(const Plan& plan, int count, Placer& placer) {
  return plan.blocks > 1 && !plan.cluster ? placer.place_in_workspace(floats(count)) : placer.place(floats(count));
}

void place_blocks(const Model& m, int operand_bytes, Plan& plan, Placer& placer) {
  plan.vectors = placer.place(floats(kReductionWords + 5 * plan.rows + 2 * pad(m.chunk)));
  for (int i = 0; i < m.depth; ++i) {
    const int floats_of_layer = pad(held_in(m, plan, i)) * weight_stride(held_out(m, plan, i));
    plan.w[i] = placer.place(floats(floats_of_layer));
    plan.s[i] = placer.place(floats(floats_of_layer));
  }
  for (int i = 0; i < m.depth; ++i) {
    plan.layer_input[i] = placer.place(matrix(m.chunk, held_in(m, plan, i), operand_bytes));
    plan.output_grad[i] = placer.place(matrix(m.chunk, held_out(m, plan, i), operand_bytes));
  }
  plan.coefficients = placer.place(floats(plan.rows * pad(m.chunk)));
  for (int i = 0; i + 1 < m.depth; ++i)
    plan.x[i] = placer.place(matrix(plan.rows, held_out(m, plan, i), operand_bytes));
  plan.q = placer.place(matrix(plan.rows, m.width, operand_bytes));
  plan.scores = placer.place(matrix(plan.rows, m.chunk, operand_bytes));
  const int partial = plan.blocks > 1 ? m.width + pad(m.chunk) : 0;
  plan.exchange = place_exchange(plan, plan.rows * (m.width + partial) + kReductionWords, placer);
}

void place_token(const Model& m, Plan& plan, Placer& placer) {
  // The token's vectors: k, q, output_grad and x of each layer, derivatives. Also the partial sums of warps.
  const int widths = pad(widest(m));
  plan.vectors = placer.place(floats(kReductionWords + (3 + 4 * m.depth) * widths + 3 * pad(m.chunk)));
  plan.coefficients = placer.place(floats(3 * 8 * std::max(widths, pad(m.chunk))));
  plan.exchange = place_exchange(plan, 2 * m.width + pad(m.chunk) + kReductionWords, placer);
  Placer all = placer;
  const auto weights = [&](int i) { return floats(held_in(m, plan, i) * held_out(m, plan, i)); };
  // W of later layers is read three times, everything else once, so it is placed first.
  for (int i = m.depth - 1; i >= 0; --i) plan.w[i] = all.place(weights(i));
  for (int i = 0; i < m.depth; ++i) plan.s[i] = all.place(weights(i));
  plan.staged = all.workspace() == placer.workspace();
  if (plan.staged) placer = all;
}

void place_read(const Model& m, int operand_bytes, Plan& plan, Placer& placer) {
  plan.vectors = placer.place(floats(kReductionWords));
  plan.exchange = placer.place(floats(plan.rows * m.width));
  plan.q = placer.place(matrix(plan.rows, m.width, operand_bytes));
  for (int i = 0; i + 1 < m.depth; ++i) plan.x[i] = placer.place(matrix(plan.rows, m.widths[i + 1], operand_bytes));
}

// The shared memory that each of two blocks on a multiprocessor can have. The system reserves some per block.
std::size_t half_of(const CudaDevice& device) {
  constexpr std::size_t kReserved = 1024;
  return (device.shared_bytes + kReserved) / 2 - kReserved;
}

// Whether everything except the exchange area is in shared memory.
bool in_shared(const Model& m, const Plan& plan) {
  bool all = plan.staged && plan.vectors.shared && plan.coefficients.shared && plan.q.shared && plan.scores.shared;
  for (int i = 0; i < m.depth; ++i) {
    all = all && plan.w[i].shared && plan.s[i].shared && plan.layer_input[i].shared && plan.output_grad[i].shared &&
          plan.x[i].shared;
  }
  return all;
}

Plan plan_for(const Model& m, const CudaDevice& device, const Request& request, int blocks, int rows,
              std::size_t shared_bytes) {
  Plan plan;
  plan.blocks = blocks;
  plan.cluster = blocks > 1 && device.sm >= kFirstClusterSm;
  plan.share = m.share(blocks);
  plan.rows = rows;
  Placer placer(shared_bytes);
  switch (request.kind) {
    case Kind::kBlocks:
      place_blocks(m, request.operand_bytes, plan, placer);
      break;
    case Kind::kToken:
      place_token(m, plan, placer);
      break;
    case Kind::kRead:
      place_read(m, request.operand_bytes, plan, placer);
      break;
  }
  plan.shared = in_shared(m, plan);
  plan.shared_bytes = static_cast<std::uint32_t>(placer.shared());
  // Reading elements in place takes more registers than two blocks per multiprocessor can have.
  const bool two = request.kind == Kind::kToken && plan.shared && placer.shared() <= half_of(device);
  plan.resident = two ? 2 : 1;
  plan.workspace_bytes = static_cast<std::uint32_t>(round_up(placer.workspace(), kWorkspaceAlignment));
  return plan;
}

// Whether `blocks` blocks can share a head, with a nonempty part each.
bool can_share(const Model& m, Kind kind, int blocks) {
  if (blocks == 1) return true;
  return kind != Kind::kRead && m.depth <= 2 && m.share(blocks) * (blocks - 1) < m.widths[m.depth - 1];
}

int rows_of(const Model& m, const Request& request) {
  if (request.kind == Kind::kToken) return 1;
  return request.kind == Kind::kRead ? kMostRows : std::min(kMostRows, pad(m.chunk));
}

// Ranks a plan: 2 if everything is in shared memory, 1 if W and S are, because they are used most.
int fitness(const Model& m, const Plan& plan) {
  if (plan.shared) return kBestFitness;
  bool state = plan.staged;
  for (int i = 0; i < m.depth; ++i) state = state && plan.w[i].shared && plan.s[i].shared;
  return state ? 1 : 0;
}

constexpr float kInfinity = std::numeric_limits<float>::infinity();

Decoder make_decoder(MemoryDtype memory_dtype) {
  switch (memory_dtype) {
    case MemoryDtype::kBFloat16:
      return {2, 1, 16, 0x7FFF, 0x8000, 16, 16, 0, 1.0F, -0.0F, kInfinity};
    case MemoryDtype::kFloat16:
      return {2, 1, 16, 0x7FFF, 0x8000, 13, 16, 0, 0x1p112F, -0.0F, 0x1p16F};
    case MemoryDtype::kInt8:  // b + 128 in the lowest bits of 2^23
      return {4, 2, 8, 0xFF, 0, 0, 0, 0x4B000080, 1.0F, -0x1p23F - 128.0F, kInfinity};
    case MemoryDtype::kFp8:
      return {4, 2, 8, 0x7F, 0x80, 20, 24, 0, 0x1p120F, -0.0F, kInfinity};
    default:
      return {1, 0, 32, 0x7FFFFFFF, 0x80000000, 0, 0, 0, 1.0F, -0.0F, kInfinity};
  }
}

Encoder make_encoder(MemoryDtype memory_dtype) {
  switch (memory_dtype) {
    case MemoryDtype::kFloat16:
      return {0x1p-14F, 0x1p24F, 13, 112U << 10, 0x7C00, 0x7E00, 0.0F};
    case MemoryDtype::kInt8:
      return {kInfinity, 1.0F, 16, 0, 127, 0, kLargestInt8};
    case MemoryDtype::kFp8:
      return {0x1p-6F, 0x1p9F, 20, 120U << 3, 0x7E, 0, kLargestFp8};
    default:
      return {0.0F, 1.0F, 16, 0, 0x7F80, 0x7FC0, 0.0F};
  }
}

}  // namespace

Codec make_codec(const MemoryConfiguration& c) {
  return {has_scales(c.memory_dtype),   c.memory_dtype, make_decoder(c.memory_dtype),
          make_encoder(c.memory_dtype), c.rounding,     c.seed};
}

Field make_field(const MemoryConfiguration& c, int tensor, std::int64_t offset) {
  const std::int64_t rows = c.rows(tensor), columns = c.columns(tensor);
  return {static_cast<int>(offset), static_cast<int>(offset + element_words(c.memory_dtype, rows, columns)),
          static_cast<int>(columns), static_cast<int>((columns + kScaleBlock - 1) / kScaleBlock)};
}

Model make_model(const Configuration& c) {
  const RowLayout layout(c);
  Model m{};
  static_cast<Codec&>(m) = make_codec(c);
  m.depth = c.depth;
  m.chunk = static_cast<int>(c.chunk_size);
  m.width = static_cast<int>(c.widths[0]);
  for (int i = 0; i <= c.depth; ++i) m.widths[i] = static_cast<int>(c.widths[static_cast<std::size_t>(i)]);
  for (int i = 0; i < c.depth; ++i) {
    const auto layer = static_cast<std::size_t>(i);
    const auto field = [&](std::int64_t offset) { return make_field(c, i, offset); };
    m.w[i] = field(layout.w[layer]);
    m.s[i] = field(layout.s[layer]);
    m.ew[i] = field(layout.ew[layer]);
    m.es[i] = field(layout.es[layer]);
    m.layer_input[i] = static_cast<int>(layout.layer_input[layer]);
    m.output_grad[i] = static_cast<int>(layout.output_grad[layer]);
  }
  m.e = static_cast<int>(layout.e);
  m.a = static_cast<int>(layout.a);
  m.m = static_cast<int>(layout.m);
  m.f = static_cast<int>(layout.f);
  m.beta = static_cast<int>(layout.beta);
  m.chunk_updates = static_cast<int>(layout.chunk_updates);
  m.row = static_cast<int>(layout.size);
  m.update = c.mode == Mode::kUpdate;
  m.aligned = c.schedule == Schedule::kAligned;
  m.gelu = c.activation == Activation::kGelu;
  m.residual = c.residual;
  m.layer_norm = c.layer_norm;
  return m;
}

// Shared memory per block to try, best first. A one-token call only streams W and S through it, so two blocks per
// multiprocessor are better: one copies while the other computes.
std::array<std::size_t, 2> budgets(const CudaDevice& device, Kind kind) {
  return {kind == Kind::kToken ? half_of(device) : device.shared_bytes, device.shared_bytes};
}

// Chooses the fewest blocks whose shared memory holds W and S. Takes more if multiprocessors would stay idle, and fewer
// rows if only a few kilobytes are missing.
Plan make_plan(const Model& m, const CudaDevice& device, const Request& request) {
  const bool resident_only = device.sm < kFirstClusterSm;
  const int most = resident_only ? std::max(device.multiprocessors, 1) : device.most_cluster;
  const auto allowed = [&](int blocks) { return can_share(m, request.kind, blocks) && blocks <= most; };
  Plan best;
  int best_fitness = -1;
  std::size_t budget = 0;
  const auto consider = [&](int blocks) {
    for (int rows = rows_of(m, request); rows >= std::min(kPadding, rows_of(m, request)); rows /= 2) {
      const Plan plan = plan_for(m, device, request, blocks, rows, budget);
      if (fitness(m, plan) <= best_fitness) continue;
      best = plan;
      best_fitness = fitness(m, plan);
    }
  };
  for (const std::size_t each : budgets(device, request.kind)) {
    if (best_fitness == kBestFitness) break;
    budget = each;
    for (int blocks = 1; blocks <= kMostBlocks && best_fitness < kBestFitness; blocks *= 2) {
      if (allowed(blocks)) consider(blocks);
    }
  }
  for (int blocks = best.blocks * 2; blocks <= kMostBlocks && request.work * blocks <= device.multiprocessors;
       blocks *= 2) {
    if (!allowed(blocks)) continue;
    best_fitness = -1;
    consider(blocks);
  }
  return best;
}

int groups_of(const Plan& plan, const CudaDevice& device, std::int64_t work) {
  std::int64_t most = work;
  if (plan.blocks > 1 && !plan.cluster) most = device.multiprocessors * plan.resident / plan.blocks;
  if (plan.workspace_bytes > 0) most = std::min<std::int64_t>(most, 2 * device.multiprocessors / plan.blocks);
  constexpr std::int64_t kLargestGrid = 1 << 28;
  return static_cast<int>(std::max<std::int64_t>(1, std::min({work, most, kLargestGrid})));
}

std::size_t counter_bytes(int groups) {
  return round_up(static_cast<std::size_t>(groups) * sizeof(unsigned), kWorkspaceAlignment);
}

std::size_t most_workspace(const Model& m, const CudaDevice& device, const Request& request) {
  std::size_t most = 0;
  for (int blocks = 1; blocks <= kMostBlocks; blocks *= 2) {
    if (!can_share(m, request.kind, blocks)) continue;
    for (const std::size_t budget : budgets(device, request.kind)) {
      for (int rows = rows_of(m, request); rows >= std::min(kPadding, rows_of(m, request)); rows /= 2) {
        const Plan plan = plan_for(m, device, request, blocks, rows, budget);
        const int groups = groups_of(plan, device, request.work);
        const std::size_t all = static_cast<std::size_t>(groups) * static_cast<std::size_t>(blocks);
        most = std::max(most, counter_bytes(groups) + all * plan.workspace_bytes);
      }
    }
  }
  return most;
}

std::string describe(const Plan& plan) {
  const auto where = [](const Place& place) { return std::string(place.shared ? "shared" : "workspace"); };
  return "blocks " + std::to_string(plan.blocks) + (plan.cluster ? " in a cluster" : "") + ", rows " +
         std::to_string(plan.rows) + ", state " + (plan.staged ? where(plan.w[0]) : "in place") + ", exchange " +
         where(plan.exchange) + ", shared " + std::to_string(plan.shared_bytes) + " bytes, workspace " +
         std::to_string(plan.workspace_bytes) + " bytes a block";
}

}  // namespace titans::kernels::cuda
