// A bundle opened on a device, shared by all its streams.
#pragma once

#include <filesystem>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "backends/backend.h"
#include "base/thread_pool.h"
#include "session/engine_choice.h"
#include "session/metrics.h"
#include "session/state_cache.h"
#include "state/state_schema.h"

namespace titans::core {

struct SessionOptions {
  std::string device = "cpu";
  std::string backend;               // empty: by device
  std::string backend_library;       // empty: search
  std::filesystem::path plugin_dir;  // empty: beside this library
  int threads = 0;
  std::string memory_kernel = "auto";
  std::string engine;     // required engine of the bundle; "none": the plain graphs; empty: by device
  std::string libraries;  // MODULE=PATH lines: vendor libraries that neither the caller nor the environment names
  int batch_threads = 0;  // threads per batch; 0: the number of processors
  std::uint64_t memory_budget = 0;           // bytes for the state of all streams; 0: no limit
  std::filesystem::path spill_dir;           // folder for states beyond the budget
  std::string guard = "bundle";              // of new streams: "bundle", or a policy with the bundle's limits
  std::string batch = "exact";               // "exact": as if each stream ran alone; "fast": streams share graph calls
  std::optional<std::string> expect_sha256;  // of the bundle; none: any
  std::string operators = "known";           // of graphs: "known", or "any"
};

// A memory field for users: "layers.0.memory.W0", shape (1, heads, rows, columns).
struct MemoryView {
  std::string name;
  Shape shape;
  std::size_t elements;
  std::size_t state;    // index of its state tensor
  std::size_t offset;   // first word within the tensor's last dimension
  std::size_t extent;   // elements per row
  std::size_t columns;  // of a matrix; a vector is one row
  FieldDtype dtype;
};

// A field whose norm shows whether its memory diverges.
struct NormField {
  std::string name;    // "layers.0.memory.W0"
  std::size_t memory;  // index into Session::memories
  std::size_t state;   // index of its state tensor
  std::int32_t layer;  // index of the memory among all memories
  std::size_t offset, extent, columns;
  FieldDtype dtype;
  std::size_t row, heads;
  double limit;      // the bundle's limit; infinity without one
  double diverging;  // a norm above counts as diverging: the limit, or many times what calibration saw
};

class Session {
 public:
  static std::shared_ptr<Session> open(const std::filesystem::path& path, const SessionOptions& options);
  // `device_info` and `choice` are reported by info().
  Session(std::unique_ptr<const Bundle> bundle, std::unique_ptr<Executor> executor, const SessionOptions& options,
          const DeviceInfo& device_info = {}, const EngineChoice& choice = {});
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  const Manifest& manifest() const { return bundle_->manifest(); }
  const Bundle& bundle() const { return *bundle_; }
  Executor& executor() const { return *executor_; }
  const std::string& info() const { return info_; }
  // The schema of its streams' state files.
  const StateSchema& state_schema() const { return state_schema_; }
  const std::vector<MemoryView>& memories() const { return memories_; }
  // The fields that health and guards measure.
  const std::vector<NormField>& norm_fields() const { return norm_fields_; }
  // Tokens between two checks of a stream's health without a guard.
  std::uint64_t check_interval() const { return check_interval_; }
  // The guard of new streams; its policy may be off.
  const titans_guard& default_guard() const { return default_guard_; }
  Metrics& metrics() { return metrics_; }
  // Prometheus text, labelled with the name of the bundle's folder.
  std::string metrics_text() const;
  // The number of chunk updates, over all memories, made by `tokens` tokens from `position`.
  std::uint64_t chunk_updates(std::uint64_t position, std::uint64_t tokens) const;
  // Index, in the manifest's graphs, of the graph to run at `position` with `remaining` tokens left.
  std::size_t next_graph(std::uint64_t position, std::size_t remaining) const {
    return bundle_->graphs()[bundle_->schedule().next_graph(position, remaining)].graph;
  }
  // Input: floats per vector, or the vocabulary size. Output: floats per row.
  std::size_t input_size() const { return static_cast<std::size_t>(manifest().input_size); }
  std::size_t output_size() const { return static_cast<std::size_t>(manifest().output_size); }

  // NULL without a memory budget.
  StateCache* state_cache() const { return cache_.get(); }
  // True if the streams of a batch share graph calls.
  bool groups_batches() const { return groups_batches_; }
  // The most streams that one call of that graph, an index in the manifest's graphs, takes in a batch.
  std::size_t most_streams(std::size_t graph) const;
  // The number of streams that fit into the memory budget, at least one.
  std::size_t streams_in_budget() const;
  // The threads for batches, started by the first batch.
  ThreadPool& batch_threads();

  // Holds a workspace for one call. The session keeps as many as calls were ever in flight, so idle streams hold none.
  class WorkspaceLease {
   public:
    explicit WorkspaceLease(Session& session);
    ~WorkspaceLease();
    WorkspaceLease(const WorkspaceLease&) = delete;
    WorkspaceLease& operator=(const WorkspaceLease&) = delete;
    Workspace& get() const { return *workspace_; }

   private:
    Session& session_;
    std::unique_ptr<Workspace> workspace_;
  };

 private:
  std::unique_ptr<const Bundle> bundle_;
  std::unique_ptr<Executor> executor_;  // reads the bundle's mappings, so it is destroyed first
  std::vector<MemoryView> memories_;
  std::vector<NormField> norm_fields_;
  std::uint64_t check_interval_ = 1;
  titans_guard default_guard_;
  std::string info_;
  StateSchema state_schema_;
  // Memories whose chunks end at the same positions.
  struct ChunkGroup {
    std::uint64_t chunk;
    StreamRows rows;
    std::uint64_t memories;
  };
  std::vector<ChunkGroup> chunk_groups_;
  Metrics metrics_;
  const int batch_thread_count_;
  const bool groups_batches_;
  std::unique_ptr<StateCache> cache_;
  std::mutex mutex_;  // guards the members below
  std::vector<std::unique_ptr<Workspace>> idle_;
  std::size_t workspaces_ = 0;  // idle or not
  std::unique_ptr<ThreadPool> batch_threads_;
};

}  // namespace titans::core
