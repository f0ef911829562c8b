// A bundle opened for use: manifest read, files checked, tensors mapped.
#pragma once

#include <filesystem>
#include <functional>
#include <list>
#include <vector>

#include "base/mapped_file.h"
#include "base/safetensors.h"
#include "bundle/manifest.h"
#include "bundle/schedule.h"

namespace titans::core {

// Which engine of the manifest to open, NULL for the plain graphs. Asked when the manifest is read and before any other
// file is opened.
using EngineChooser = std::function<const EngineRecord*(const Manifest&)>;

class Bundle {
 public:
  // Without a chooser the plain graphs.
  explicit Bundle(const std::filesystem::path& folder, const EngineChooser& choose = {});
  // The engine points into the manifest.
  Bundle(const Bundle&) = delete;
  Bundle& operator=(const Bundle&) = delete;

  const std::filesystem::path& folder() const { return folder_; }
  const Manifest& manifest() const { return manifest_; }
  // NULL: the plain graphs.
  const EngineRecord* engine() const { return engine_; }
  // The graphs that are there to run, and the file of each: the engine's, or all of the manifest's.
  const std::vector<EngineGraph>& graphs() const { return graphs_; }
  // Of `graphs`, in their order.
  const Schedule& schedule() const { return schedule_; }
  // The `weights` of each of `graphs` are in here: the bundle's, and those that the engine has in a file of its own;
  // nothing with an engine that holds all of them itself.
  const Tensors& weights() const { return weights_; }
  // One tensor for each of the manifest's state, of its shape and type.
  const Tensors& initial_state() const { return initial_state_; }

 private:
  // Maps a file after checking its size and hash against the manifest.
  const MappedFile& open_checked(const std::string& name);
  bool needs_weights() const;
  // Adds those of the engine's own file, if it has one.
  void read_engine_weights();
  void check_weights() const;
  void check_initial_state() const;

  std::filesystem::path folder_;
  Manifest manifest_;
  const EngineRecord* engine_;
  std::vector<EngineGraph> graphs_;
  Schedule schedule_;
  std::list<MappedFile> mapped_;  // what the tensors point into
  Tensors weights_;
  Tensors initial_state_;
};

}  // namespace titans::core
