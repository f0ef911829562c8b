#include "bundle/bundle.h"

#include <sys/stat.h>

#include <cctype>
#include <map>

#include <gtest/gtest.h>

#include "base/sha256.h"
#include "test_bundle.h"

namespace titans::test {
namespace {

class BundleTest : public testing::Test {
 protected:
  BundleTest() { write_bundle(folder_.path()); }
  void refuse(const std::vector<std::string>& words) {
    expect_error(TITANS_FAILED, words, [&] { core::Bundle bundle(folder_.path()); });
  }
  TemporaryFolder folder_;
};

TEST_F(BundleTest, Opens) {
  const core::Bundle bundle(folder_.path());
  EXPECT_EQ(bundle.weights().at("E").bytes, 8U);
  EXPECT_EQ(bundle.initial_state().size(), 2U);
}

// The digest of `xxhsum -H2`: our hashes agree with other programs.
TEST_F(BundleTest, HashOfAKnownText) {
  write_file(folder_.path() / "empty", "");
  EXPECT_EQ(core::MappedFile(folder_.path() / "empty").hash(), "99aa06d3014798d86001c324468d497f");
}

// Digests of FIPS 180-4's examples, whole and in parts.
TEST(Sha256, HashesOfKnownTexts) {
  EXPECT_EQ(core::sha256(""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(core::sha256("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(core::sha256("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq"),
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  const std::string million(1'000'000, 'a');
  const std::string expected = "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0";
  EXPECT_EQ(core::sha256(million), expected);
  for (const std::size_t part : {1U, 55U, 63U, 64U, 65U, 119U, 4096U}) {
    core::Sha256 hash;
    for (std::size_t at = 0; at < million.size(); at += part) hash.add(std::string_view(million).substr(at, part));
    EXPECT_EQ(hash.hex(), expected) << part;
  }
}

TEST_F(BundleTest, AnotherSha256ThanExpected) {
  std::map<std::string, std::string> files;  // sorted by name
  for (const auto& entry : std::filesystem::directory_iterator(folder_.path())) {
    files[entry.path().filename().string()] = read_file(entry.path());
  }
  std::string lines;
  for (const auto& [name, content] : files) lines += core::sha256(content) + "  " + name + "\n";
  std::string digits = core::sha256(lines);
  EXPECT_NO_THROW(core::Bundle(folder_.path(), {}, digits));
  for (char& c : digits) c = static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
  EXPECT_NO_THROW(core::Bundle(folder_.path(), {}, digits));
  digits.back() = digits.back() == '0' ? '1' : '0';
  expect_error(TITANS_FAILED, {"another bundle than expected", digits, "TITANS-E0211"},
               [&] { core::Bundle bundle(folder_.path(), {}, digits); });
}

TEST_F(BundleTest, NoFolder) {
  expect_error(TITANS_FAILED, {"nowhere"}, [] { core::Bundle bundle("/nowhere"); });
  expect_error(TITANS_FAILED, {"manifest.json"}, [&] { core::Bundle bundle(folder_.path() / "manifest.json"); });
}

TEST_F(BundleTest, NoManifest) {
  std::filesystem::remove(folder_.path() / "manifest.json");
  refuse({"manifest.json", "No such file"});
}

class FileTest : public BundleTest, public testing::WithParamInterface<const char*> {
 protected:
  std::filesystem::path file() const { return folder_.path() / GetParam(); }
};

INSTANTIATE_TEST_SUITE_P(Bundle, FileTest, testing::Values("decode.onnx", "weights.safetensors", "state.safetensors"));

TEST_P(FileTest, Missing) {
  std::filesystem::remove(file());
  refuse({GetParam(), "No such file"});
}

TEST_P(FileTest, OneByteChanged) {
  std::string content = read_file(file());
  content[content.size() - 1] = static_cast<char>(content[content.size() - 1] ^ 1);
  write_file(file(), content);
  refuse({GetParam(), "hash"});
}

TEST_P(FileTest, Truncated) {
  const std::string content = read_file(file());
  write_file(file(), content.substr(0, content.size() / 2));
  refuse({GetParam(), std::to_string(content.size()) + " bytes"});
}

TEST_P(FileTest, SymbolicLink) {
  std::filesystem::rename(file(), folder_.path() / "elsewhere");
  std::filesystem::create_symlink("elsewhere", file());
  refuse({GetParam(), "symbolic link"});
}

TEST_P(FileTest, NotAFile) {
  std::filesystem::remove(file());
  std::filesystem::create_directory(file());
  refuse({GetParam(), "not a regular file"});
  std::filesystem::remove(file());
  ASSERT_EQ(mkfifo(file().c_str(), 0600), 0);
  refuse({GetParam(), "not a regular file"});
}

TEST_P(FileTest, NotListed) {
  nlohmann::json manifest = nlohmann::json::parse(read_file(folder_.path() / "manifest.json"));
  manifest["files"].erase(GetParam());
  write_file(folder_.path() / "manifest.json", manifest.dump());
  refuse({GetParam(), "files."});
}

TEST_F(BundleTest, StateUnlikeTheManifest) {
  nlohmann::json manifest = manifest_json();
  manifest["state"][0]["shape"] = {1, 4, 1};
  manifest["state"][0].erase("layout");
  write_manifest(folder_.path(), manifest);
  refuse({"state.safetensors", "layers.0.memory as float32 [1, 4, 1]", "[1, 1, 4]"});
  manifest["state"][0]["name"] = "other";
  write_manifest(folder_.path(), manifest);
  refuse({"state.safetensors", "other", "no such tensor"});
}

TEST_F(BundleTest, TheTokenizersFile) {
  write_file(folder_.path() / "tokenizer.json", "{}");
  nlohmann::json manifest = manifest_json();
  manifest["tokenizer"] = {{"kind", "file"}, {"file", "tokenizer.json"}};
  write_manifest(folder_.path(), manifest);
  EXPECT_NO_THROW(core::Bundle{folder_.path()});
  write_file(folder_.path() / "tokenizer.json", "[]");
  refuse({"tokenizer.json", "hash"});
  std::filesystem::remove(folder_.path() / "tokenizer.json");
  refuse({"tokenizer.json", "No such file"});
}

class EngineWeightsTest : public BundleTest {
 protected:
  // Writes a bundle whose engine has its tensors in a separate file and passes `handed` to its one graph.
  void write(const std::vector<std::string>& handed, const std::string& tensors) {
    write_file(folder_.path() / "cpu.decode.onnx", "an engine's graph");
    write_file(folder_.path() / "cpu.safetensors", tensors);
    nlohmann::json manifest = manifest_json();
    manifest["engines"] = {{{"name", "cpu"},
                            {"target", "cpu"},
                            {"compiler", "onnxruntime"},
                            {"compiler_version", "1.32.0"},
                            {"precision", "fp32"},
                            {"device", "cpu"},
                            {"platform", "linux-x86_64"},
                            {"memory", "either"},
                            {"weights", {{"file", "cpu.safetensors"}}},
                            {"graphs", {{{"graph", "decode"}, {"file", "cpu.decode.onnx"}, {"weights", handed}}}}}};
    write_manifest(folder_.path(), manifest);
  }
  static std::string tensor(const std::string& name) {
    return safetensors(R"({")" + name + R"(":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})", float_bytes({1, 2}));
  }
  static const core::EngineRecord* choose(const core::Manifest& manifest) { return &manifest.engines.at(0); }
  void refuse_engine(const std::vector<std::string>& words) {
    expect_error(TITANS_FAILED, words, [&] { core::Bundle bundle(folder_.path(), choose); });
  }
};

TEST_F(EngineWeightsTest, AreThereWithTheBundles) {
  write({"E", "constant.1"}, tensor("constant.1"));
  const core::Bundle bundle(folder_.path(), choose);
  EXPECT_EQ(bundle.weights().at("E").bytes, 8U);
  EXPECT_EQ(bundle.weights().at("constant.1").bytes, 8U);
  EXPECT_EQ(core::Bundle(folder_.path()).weights().count("constant.1"), 0U) << "only the engine's graphs read it";
}

TEST_F(EngineWeightsTest, AreRefusedWhereTheyAreNotAsListed) {
  write({"constant.2"}, tensor("constant.1"));
  refuse_engine({"tensor constant.2 of graph decode"});
  write({"E"}, tensor("E"));
  refuse_engine({"cpu.safetensors", "tensor E is also in", "build the engine again"});
  write({"constant.1"}, tensor("constant.1"));
  write_file(folder_.path() / "cpu.safetensors", tensor("constant.2"));
  refuse_engine({"cpu.safetensors", "hash"});
  std::filesystem::remove(folder_.path() / "cpu.safetensors");
  refuse_engine({"cpu.safetensors", "No such file"});
}

TEST_F(BundleTest, AWeightThatIsNotThere) {
  nlohmann::json manifest = manifest_json();
  manifest["graphs"][2]["weights"] = {"F"};
  write_manifest(folder_.path(), manifest);
  refuse({"weights.safetensors", "tensor F of graph chunk"});
}

}  // namespace
}  // namespace titans::test
