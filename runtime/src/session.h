// A bundle opened on a device, shared by all its streams.
#pragma once

#include <filesystem>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "backend.h"
#include "engine_choice.h"

namespace titans::core {

struct SessionOptions {
  std::string device = "cpu";
  std::string backend;               // empty: by device
  std::string backend_library;       // empty: search
  std::filesystem::path plugin_dir;  // empty: beside this library
  int threads = 0;
  std::string memory_kernel = "auto";
  std::string engine;     // of the bundle, to insist on; "none": the plain graphs; empty: by device
  std::string libraries;  // MODULE=PATH lines: where vendors' libraries lie that nothing else says where to find
};

// A field of a memory as people see it: "layers.0.memory.W0", shape (1, heads, rows, columns).
struct MemoryView {
  std::string name;
  Shape shape;
  std::size_t elements;
  std::size_t state;    // index of the state tensor that holds it
  std::size_t offset;   // of the field within the tensor's last dimension
  std::size_t extent;   // elements of the field within one row
  std::size_t columns;  // of a matrix, or of a vector as one row
  FieldStorage storage;
};

class Session {
 public:
  static std::shared_ptr<Session> open(const std::filesystem::path& path, const SessionOptions& options);
  // `facts` and `choice` are what the session's info tells.
  Session(std::unique_ptr<const Bundle> bundle, std::unique_ptr<Engine> engine, const SessionOptions& options,
          const DeviceFacts& facts = {}, const EngineChoice& choice = {});

  const Manifest& manifest() const { return bundle_->manifest(); }
  const Bundle& bundle() const { return *bundle_; }
  Engine& engine() const { return *engine_; }
  const std::string& info() const { return info_; }
  const std::vector<MemoryView>& memories() const { return memories_; }
  // Index into the manifest's graphs of the one that runs next at `position`, where `remaining` tokens are left.
  std::size_t next_graph(std::uint64_t position, std::size_t remaining) const {
    return bundle_->graphs()[bundle_->schedule().next_graph(position, remaining)].graph;
  }
  // Floats of a vector that goes in, or the vocabulary; floats of a row that comes out.
  std::size_t input_size() const { return static_cast<std::size_t>(manifest().input_size); }
  std::size_t output_size() const { return static_cast<std::size_t>(manifest().output_size); }

  // A workspace for the time of one call into the library. There are as many as calls were ever in flight at once, so
  // idle streams hold none.
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
  std::unique_ptr<Engine> engine_;  // reads the bundle's mappings: destroyed before them
  std::vector<MemoryView> memories_;
  std::string info_;
  std::mutex mutex_;  // guards what follows
  std::vector<std::unique_ptr<Workspace>> idle_;
  std::size_t workspaces_ = 0;  // idle or not
};

}  // namespace titans::core
