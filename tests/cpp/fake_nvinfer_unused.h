// The methods of TensorRT's interfaces that our backend never calls; each aborts. One list covers all versions. A
// method that a version lacks is then just an unused function.
#pragma once

#include <NvInferRuntime.h>

#include <cstdlib>

namespace titans::test {

#define UNUSED(result, call) \
  virtual result call noexcept { std::abort(); }
#define UNUSED_CONST(result, call) \
  virtual result call const noexcept { std::abort(); }

using namespace nvinfer1;  // NOLINT: everything below uses its names
using Name = char const*;

class UnusedRuntime : public apiv::VRuntime {
 public:
#if NV_TENSORRT_MAJOR == 10
  UNUSED(ICudaEngine*, deserializeCudaEngine(IStreamReader&))
#endif
  UNUSED(void, setDLACore(int32_t))
  UNUSED_CONST(int32_t, getDLACore())
  UNUSED_CONST(int32_t, getNbDLACores())
  UNUSED(void, setGpuAllocator(IGpuAllocator*))
  UNUSED(void, setErrorRecorder(IErrorRecorder*))
  UNUSED_CONST(IErrorRecorder*, getErrorRecorder())
  UNUSED(bool, setMaxThreads(int32_t))
  UNUSED_CONST(int32_t, getMaxThreads())
  UNUSED(void, setTemporaryDirectory(Name))
  UNUSED_CONST(Name, getTemporaryDirectory())
  UNUSED(void, setTempfileControlFlags(TempfileControlFlags))
  UNUSED_CONST(TempfileControlFlags, getTempfileControlFlags())
  UNUSED(void, setPluginRegistryParent(IPluginRegistry*))
  UNUSED(IRuntime*, loadRuntime(Name))
  UNUSED(void, setEngineHostCodeAllowed(bool))
  UNUSED_CONST(bool, getEngineHostCodeAllowed())
#if NV_TENSORRT_MAJOR > 10 || NV_TENSORRT_MINOR >= 7
  UNUSED(ICudaEngine*, deserializeCudaEngineV2(IStreamReaderV2&))
#endif
};

class UnusedEngine : public apiv::VCudaEngine {
 public:
  UNUSED_CONST(int32_t, getNbLayers())
  UNUSED_CONST(IHostMemory*, serialize())
  UNUSED(IExecutionContext*, createExecutionContextWithoutDeviceMemory())
  UNUSED_CONST(size_t, getDeviceMemorySize())
  UNUSED_CONST(bool, isRefittable())
  UNUSED_CONST(Name, getName())
  UNUSED_CONST(int32_t, getNbOptimizationProfiles())
  UNUSED_CONST(int32_t const*, getProfileTensorValues(Name, int32_t, OptProfileSelector))
  UNUSED_CONST(EngineCapability, getEngineCapability())
  UNUSED(void, setErrorRecorder(IErrorRecorder*))
  UNUSED_CONST(IErrorRecorder*, getErrorRecorder())
  UNUSED_CONST(bool, hasImplicitBatchDimension())
  UNUSED_CONST(TacticSources, getTacticSources())
  UNUSED_CONST(ProfilingVerbosity, getProfilingVerbosity())
  UNUSED_CONST(IEngineInspector*, createEngineInspector())
  UNUSED_CONST(bool, isShapeInferenceIO(Name))
  UNUSED_CONST(int32_t, getTensorBytesPerComponent(Name))
  UNUSED_CONST(int32_t, getTensorComponentsPerElement(Name))
  UNUSED_CONST(TensorFormat, getTensorFormat(Name))
  UNUSED_CONST(Name, getTensorFormatDesc(Name))
  UNUSED_CONST(int32_t, getTensorVectorizedDim(Name))
  UNUSED_CONST(Dims, getProfileShape(Name, int32_t, OptProfileSelector))
  UNUSED_CONST(HardwareCompatibilityLevel, getHardwareCompatibilityLevel())
  UNUSED_CONST(int32_t, getNbAuxStreams())
  UNUSED_CONST(int32_t, getTensorBytesPerComponentV2(Name, int32_t))
  UNUSED_CONST(int32_t, getTensorComponentsPerElementV2(Name, int32_t))
  UNUSED_CONST(TensorFormat, getTensorFormatV2(Name, int32_t))
  UNUSED_CONST(Name, getTensorFormatDescV2(Name, int32_t))
  UNUSED_CONST(int32_t, getTensorVectorizedDimV2(Name, int32_t))
  UNUSED(ISerializationConfig*, createSerializationConfig())
  UNUSED_CONST(IHostMemory*, serializeWithConfig(ISerializationConfig&))
  UNUSED_CONST(size_t, getDeviceMemorySizeForProfile(int32_t))
  UNUSED(IRefitter*, createRefitter(ILogger&))
  UNUSED(bool, setWeightStreamingBudget(int64_t))
  UNUSED_CONST(int64_t, getWeightStreamingBudget())
  UNUSED_CONST(int64_t, getMinimumWeightStreamingBudget())
  UNUSED_CONST(int64_t, getStreamableWeightsSize())
  UNUSED_CONST(bool, isDebugTensor(Name))
  UNUSED(bool, setWeightStreamingBudgetV2(int64_t))
  UNUSED_CONST(int64_t, getWeightStreamingBudgetV2())
  UNUSED_CONST(int64_t, getWeightStreamingAutomaticBudget())
  UNUSED_CONST(int64_t, getWeightStreamingScratchMemorySize())
  UNUSED_CONST(int64_t, getDeviceMemorySizeV2())
  UNUSED_CONST(int64_t, getDeviceMemorySizeForProfileV2(int32_t))
#if NV_TENSORRT_MAJOR > 10 || NV_TENSORRT_MINOR >= 11
  UNUSED_CONST(int64_t const*, getProfileTensorValuesV2(Name, int32_t, OptProfileSelector))
  UNUSED(IExecutionContext*, createExecutionContextWithRuntimeConfig(IRuntimeConfig*))
  UNUSED(IRuntimeConfig*, createRuntimeConfig())
#endif
#if NV_TENSORRT_MAJOR > 10
  UNUSED_CONST(int64_t, getEngineStat(EngineStat))
  UNUSED_CONST(Name, getAliasedInputTensor(Name))
#endif
};

class UnusedContext : public apiv::VExecutionContext {
 public:
  UNUSED(void, setDebugSync(bool))
  UNUSED_CONST(bool, getDebugSync())
  UNUSED(void, setProfiler(IProfiler*))
  UNUSED_CONST(IProfiler*, getProfiler())
  UNUSED_CONST(ICudaEngine const&, getEngine())
  UNUSED(void, setName(Name))
  UNUSED_CONST(Name, getName())
  UNUSED(void, setDeviceMemory(void*))
  UNUSED_CONST(int32_t, getOptimizationProfile())
  UNUSED_CONST(bool, allInputDimensionsSpecified())
  UNUSED_CONST(bool, allInputShapesSpecified())
  UNUSED(void, setErrorRecorder(IErrorRecorder*))
  UNUSED_CONST(IErrorRecorder*, getErrorRecorder())
  UNUSED(bool, executeV2(void* const*))
  UNUSED(bool, setOptimizationProfileAsync(int32_t, cudaStream_t))
  UNUSED(void, setEnqueueEmitsProfile(bool))
  UNUSED_CONST(bool, getEnqueueEmitsProfile())
  UNUSED_CONST(bool, reportToProfiler())
  UNUSED(bool, setInputShape(Name, Dims const&))
  UNUSED_CONST(Dims, getTensorShape(Name))
  UNUSED_CONST(Dims, getTensorStrides(Name))
  UNUSED_CONST(void const*, getTensorAddress(Name))
  UNUSED(bool, setInputTensorAddress(Name, void const*))
  UNUSED(bool, setOutputTensorAddress(Name, void*))
  UNUSED(int32_t, inferShapes(int32_t, Name*))
  UNUSED(bool, setInputConsumedEvent(cudaEvent_t))
  UNUSED_CONST(cudaEvent_t, getInputConsumedEvent())
  UNUSED_CONST(void*, getOutputTensorAddress(Name))
  UNUSED(bool, setOutputAllocator(Name, IOutputAllocator*))
  UNUSED(IOutputAllocator*, getOutputAllocator(Name))
  UNUSED_CONST(int64_t, getMaxOutputSize(Name))
  UNUSED(bool, setTemporaryStorageAllocator(IGpuAllocator*))
  UNUSED_CONST(IGpuAllocator*, getTemporaryStorageAllocator())
  UNUSED(void, setPersistentCacheLimit(size_t))
  UNUSED_CONST(size_t, getPersistentCacheLimit())
  UNUSED(bool, setNvtxVerbosity(ProfilingVerbosity))
  UNUSED_CONST(ProfilingVerbosity, getNvtxVerbosity())
  UNUSED(void, setAuxStreams(cudaStream_t*, int32_t))
  UNUSED(bool, setDebugListener(IDebugListener*))
  UNUSED(IDebugListener*, getDebugListener())
  UNUSED(bool, setTensorDebugState(Name, bool))
  UNUSED_CONST(bool, getDebugState(Name))
  UNUSED(bool, setAllTensorsDebugState(bool))
  UNUSED(size_t, updateDeviceMemorySizeForShapes())
  UNUSED(void, setDeviceMemoryV2(void*, int64_t))
#if NV_TENSORRT_MAJOR > 10 || NV_TENSORRT_MINOR >= 11
  UNUSED_CONST(IRuntimeConfig*, getRuntimeConfig())
#endif
  UNUSED(bool, setUnfusedTensorsDebugState(bool))
  UNUSED_CONST(bool, getUnfusedTensorsDebugState())
  UNUSED(bool, setCommunicator(void*))
};

// A plugin registry's.
class UnusedRegistry : public IPluginRegistry {
 public:
  UNUSED(bool, registerCreator(IPluginCreator&, Name const))
  UNUSED_CONST(IPluginCreator* const*, getPluginCreatorList(int32_t* const))
  UNUSED(IPluginCreator*, getPluginCreator(Name const, Name const, Name const))
  UNUSED(void, setErrorRecorder(IErrorRecorder* const))
  UNUSED_CONST(IErrorRecorder*, getErrorRecorder())
  UNUSED(bool, deregisterCreator(IPluginCreator const&))
  bool isParentSearchEnabled() const override { std::abort(); }
  void setParentSearchEnabled(bool const) override { std::abort(); }
  UNUSED(void, deregisterLibrary(PluginLibraryHandle))
  UNUSED(bool, registerCreator(IPluginCreatorInterface&, Name const))
  UNUSED_CONST(IPluginCreatorInterface* const*, getAllCreators(int32_t* const))
  UNUSED(IPluginCreatorInterface*, getCreator(Name const, Name const, Name const))
  UNUSED(bool, deregisterCreator(IPluginCreatorInterface const&))
  UNUSED(IPluginResource*, acquirePluginResource(Name, IPluginResource*))
  UNUSED(int32_t, releasePluginResource(Name))
  UNUSED(IPluginCreatorInterface* const*, getAllCreatorsRecursive(int32_t* const))
};

#undef UNUSED
#undef UNUSED_CONST

}  // namespace titans::test
