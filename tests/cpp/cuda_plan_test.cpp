// The plan of a CUDA call is pure arithmetic, so these tests need no GPU.
#include <gtest/gtest.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "plugins/kernels/cuda_plan.h"

namespace titans::kernels::cuda {
namespace {

struct Gpu {
  const char* name;
  CudaDevice device;
};
const Gpu kGpus[] = {{"a100", {80, 108, 166912}},    {"orin-nano", {87, 8, 166912}}, {"l4", {89, 58, 101376}},
                     {"h100", {90, 132, 232448}},    {"b200", {100, 148, 232448}},   {"thor", {110, 20, 232448}},
                     {"rtx-50", {120, 170, 101376}}, {"tiny", {120, 84, 4096}},      {"one", {86, 1, 101376}}};

const std::vector<std::vector<std::int64_t>> kWidths = {
    {1, 1}, {17, 17}, {64, 64}, {128, 128}, {64, 256, 64}, {128, 512, 128}, {31, 67, 31}, {48, 100, 33, 48}};

Model model_of(const std::vector<std::int64_t>& widths, std::int64_t chunk) {
  Attributes attributes;
  attributes.mode = "update";
  attributes.schedule = "any";
  attributes.activation = "silu";
  attributes.widths = widths;
  attributes.chunk_size = chunk;
  Configuration configuration;
  EXPECT_EQ(configure(attributes, configuration), "");
  return make_model(configuration);
}

std::vector<std::pair<std::uint32_t, bool>> places(const Plan& plan, int depth, Kind kind) {
  std::vector<Place> all{plan.vectors, plan.exchange};
  if (kind != Kind::kRead) all.push_back(plan.coefficients);
  for (int i = 0; i < depth; ++i) {
    if (plan.staged && kind != Kind::kRead) all.insert(all.end(), {plan.w[i], plan.s[i]});
    if (kind == Kind::kBlocks) all.insert(all.end(), {plan.layer_input[i], plan.output_grad[i]});
    if (kind != Kind::kToken && i + 1 < depth) all.push_back(plan.x[i]);
  }
  if (kind != Kind::kToken) all.push_back(plan.q);
  if (kind == Kind::kBlocks) all.push_back(plan.scores);
  std::vector<std::pair<std::uint32_t, bool>> out;
  for (const Place& place : all) out.emplace_back(place.offset, place.shared);
  return out;
}

template <class Use>
void each_case(const Use& use) {
  for (const Gpu& gpu : kGpus) {
    for (const auto& widths : kWidths) {
      for (const std::int64_t chunk : {1, 33, 64, 256}) {
        for (const Kind kind : {Kind::kBlocks, Kind::kToken, Kind::kRead}) {
          for (const int operand_bytes : {2, 4}) {
            SCOPED_TRACE(testing::Message() << gpu.name << ", " << widths.size() - 1 << " layers of " << widths[0]
                                            << ", chunk " << chunk << ", kind " << static_cast<int>(kind));
            use(gpu.device, model_of(widths, chunk), kind, operand_bytes);
          }
        }
      }
    }
  }
}

TEST(CudaPlan, TakesNoMoreSharedMemoryThanThereIsAndPutsEachThingSomewhereElse) {
  each_case([](const CudaDevice& device, const Model& model, Kind kind, int bytes) {
    for (const std::int64_t work : {1, 8, 264, 5000}) {
      const Plan plan = make_plan(model, device, {kind, bytes, work});
      EXPECT_LE(plan.shared_bytes, device.shared_bytes);
      EXPECT_GE(plan.rows, 1);
      auto found = places(plan, model.depth, kind);
      std::sort(found.begin(), found.end());
      EXPECT_EQ(std::adjacent_find(found.begin(), found.end()), found.end());
    }
  });
}

TEST(CudaPlan, DealsTheWholeLastLayerOutAndLeavesNoBlockWithoutAPart) {
  each_case([](const CudaDevice& device, const Model& model, Kind kind, int bytes) {
    for (const std::int64_t work : {1, 8, 264}) {
      const Plan plan = make_plan(model, device, {kind, bytes, work});
      EXPECT_GE(plan.share * plan.blocks, model.widths[model.depth - 1]);
      EXPECT_LT(plan.share * (plan.blocks - 1), model.widths[model.depth - 1]);
      if (model.depth == 3 || kind == Kind::kRead) {
        EXPECT_EQ(plan.blocks, 1);
      }
    }
  });
}

TEST(CudaPlan, BlocksThatMeetAtACounterAreAllResident) {
  each_case([](const CudaDevice& device, const Model& model, Kind kind, int bytes) {
    for (const std::int64_t work : {1, 8, 264, 5000}) {
      const Plan plan = make_plan(model, device, {kind, bytes, work});
      EXPECT_EQ(plan.cluster, plan.blocks > 1 && device.sm >= 90);
      const int groups = groups_of(plan, device, work);
      EXPECT_GE(groups, 1);
      EXPECT_LE(groups, work);
      if (plan.blocks == 1 || plan.cluster) continue;
      EXPECT_LE(groups * plan.blocks, device.multiprocessors * plan.resident);
      EXPECT_LE(plan.resident * (plan.shared_bytes + 1024), device.shared_bytes + 1024) << "1 KiB each is the system's";
      EXPECT_FALSE(plan.exchange.shared) << "no other block can read it there";
    }
  });
}

TEST(CudaPlan, AWorkspaceForTheMostIsEnoughForLess) {
  each_case([](const CudaDevice& device, const Model& model, Kind kind, int bytes) {
    const std::size_t most = most_workspace(model, device, {kind, bytes, 300});
    for (const std::int64_t work : {1, 2, 8, 33, 132, 299, 300}) {
      const Plan plan = make_plan(model, device, {kind, bytes, work});
      const int groups = groups_of(plan, device, work);
      const auto blocks = static_cast<std::size_t>(groups * plan.blocks);
      EXPECT_LE(counter_bytes(groups) + blocks * plan.workspace_bytes, most) << work;
    }
  });
}

TEST(CudaPlan, KeepsTheStateOfAnMlpOnTheChip) {
  const Model model = model_of({64, 256, 64}, 64);
  for (const Gpu& gpu : kGpus) {
    if (gpu.device.shared_bytes < 99 * 1024 || gpu.device.multiprocessors < kMostBlocks) continue;
    const Plan plan = make_plan(model, gpu.device, {Kind::kBlocks, 2, 264});
    EXPECT_TRUE(plan.w[0].shared && plan.s[1].shared) << gpu.name << ": " << describe(plan);
  }
}

}  // namespace
}  // namespace titans::kernels::cuda
