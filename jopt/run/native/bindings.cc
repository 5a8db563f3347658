// What XLA calls. Every shape is checked before a pointer is touched. Leading axes, which vmap adds,
// are equal in all operands or one; weights that all of a batch share are read once for all rows.

#include <initializer_list>
#include <string>

#include "../../native/pool.h"
#include "run.h"

namespace ffi = xla::ffi;

namespace jopt {
namespace {

using Dims = ffi::AnyBuffer::Dimensions;
using Index = std::vector<int64_t>;
using Out = ffi::Result<ffi::Buffer<ffi::F32>>;

constexpr int64_t kLongest = int64_t{1} << 16;  // inputs: sums of 255 times 127 stay within int32

// An array whose last `core` axes are one product's, and whose others run over a batch.
struct Operand {
  const char* name;
  const char* data;
  int64_t item;  // bytes of an element
  Dims dims;
  size_t core;

  size_t lead() const { return dims.size() - core; }
  int64_t operator[](size_t axis) const { return dims[lead() + axis]; }
  int64_t core_size() const {
    int64_t size = 1;
    for (size_t axis = lead(); axis < dims.size(); ++axis) size *= dims[axis];
    return size;
  }
  int64_t batch() const {
    int64_t size = 1;
    for (size_t axis = 0; axis < lead(); ++axis) size *= dims[axis];
    return size;
  }
  const char* at(const Index& index) const {
    int64_t offset = 0;
    for (size_t axis = 0; axis < lead(); ++axis)
      offset = offset * dims[axis] + (dims[axis] == 1 ? 0 : index[axis]);
    return data + offset * core_size() * item;
  }
};

template <class Buffer>
Operand operand(const char* name, const Buffer& buffer, size_t core) {
  return {name, (const char*)buffer.untyped_data(), (int64_t)ffi::ByteWidth(buffer.element_type()),
          buffer.dimensions(), core};
}

ffi::Error wrong(const char* name, const std::string& rule) {
  return ffi::Error::InvalidArgument(std::string("jopt: ") + name + " must " + rule + ".");
}

// Ranks, leading axes and alignment; x is the first operand, y the result.
ffi::Error checked(const std::initializer_list<Operand>& operands, const Operand& y) {
  for (const Operand& each : operands) {
    if (each.dims.size() < each.core) return wrong(each.name, "have more axes");
    if (each.lead() != y.lead()) return wrong(each.name, "have as many leading axes as the result");
    for (size_t axis = 0; axis < y.lead(); ++axis)
      if (each.dims[axis] != 1 && each.dims[axis] != y.dims[axis])
        return wrong(each.name, "have leading axes of the result's sizes, or one");
    if (each.core_size() && (reinterpret_cast<uintptr_t>(each.data) % each.item))
      return wrong(each.name, "be aligned");
  }
  return ffi::Error::Success();
}

// Calls run(index) for each element of the batch.
template <class Run>
void over_leads(const Operand& y, const Run& run) {
  Index index(y.lead(), 0);
  for (int64_t count = y.batch(); count > 0; --count) {
    run(index);
    for (size_t axis = y.lead(); axis-- > 0;) {
      if (++index[axis] < y.dims[axis]) break;
      index[axis] = 0;
    }
  }
}

// Calls run(index, rows) for each element of the batch, or once for all rows where the batch
// shares everything but x, and what else has its rows lets it.
template <class Run>
void over_batch(const Operand& x, const std::initializer_list<Operand>& shared, const Operand& y,
                bool together, const Run& run) {
  together = together && x.batch() == y.batch();
  for (const Operand& each : shared) together = together && each.batch() == 1;
  if (together) return run(Index(y.lead(), 0), y.batch() * x[0]);
  over_leads(y, [&](const Index& index) { run(index, x[0]); });
}

template <class T>
T* at(const Operand& operand, const Index& index) {
  return (T*)operand.at(index);
}

#define JOPT_RETURN_IF_WRONG(expression)          \
  if (ffi::Error error = (expression); error.failure()) return error

// What becomes of the outputs y: arrays of one number for each of the last axis, or for each of all
// (the fourth). Only those that are there are passed, as each operand of a call takes time.
struct Ending {
  std::array<Operand, 4> arrays;
  std::array<bool, 4> there{};
  size_t count = 0;
  float low, high;

  // Reads operands; bit i of `which` says whether array i is among them.
  ffi::Error read(const ffi::RemainingArgs& operands, int64_t which, const Operand& y) {
    static constexpr const char* kNames[] = {"less", "times", "plus", "more"};
    for (size_t i = 0; i < arrays.size(); ++i) {
      if (!(which >> i & 1)) continue;
      const auto buffer = operands.get<ffi::Buffer<ffi::F32>>(count++);
      if (!buffer.has_value()) return wrong(kNames[i], "be float32");
      there[i] = true;
      arrays[i] = operand(kNames[i], *buffer, i < 3 ? 1 : y.core);
      JOPT_RETURN_IF_WRONG(checked({arrays[i]}, y));
      for (size_t axis = 0; axis < arrays[i].core; ++axis)
        if (arrays[i][axis] != y[y.core - arrays[i].core + axis])
          return wrong(kNames[i], i < 3 ? "be (outputs)" : "be of the result's shape");
    }
    return count == operands.size() ? ffi::Error::Success() : wrong("arrays", "be as many as said");
  }
  // Whether all rows of a batch can be gone through at once.
  bool together(const Operand& y) const {
    for (size_t i = 0; i < arrays.size(); ++i)
      if (there[i] && arrays[i].batch() != (i < 3 ? 1 : y.batch())) return false;
    return true;
  }
  After after(const Index& index) const {
    auto numbers = [&](size_t i) { return there[i] ? (const float*)arrays[i].at(index) : nullptr; };
    return {numbers(0), numbers(1), numbers(2), numbers(3), low, high};
  }
};

ffi::Error product(const Operand& x, int64_t inputs, int64_t outputs, const Operand& y) {
  if (x[1] != inputs) return wrong("x", "have as many inputs as the weights");
  if (inputs > kLongest) return wrong("weights", "have at most 2^16 inputs");
  if (y[0] != x[0] || y[1] != outputs) return wrong("the result", "be (rows, outputs)");
  return ffi::Error::Success();
}

// Panels of words, (panels, words, 16, 4), for so many words and outputs.
ffi::Error in_panels(const char* name, const Operand& panels, int64_t words, int64_t outputs) {
  const bool whole = panels[2] == kPanel && panels[3] == kWord && panels[1] == words;
  if (!whole || panels[0] != round_up(outputs, kPanel) / kPanel)
    return wrong(name, "be (panels, words, 16, 4)");
  return ffi::Error::Success();
}

// int8 codes in panels, and what they come with; zero may be empty.
ffi::Error int8_panels(const Operand& codes, const Operand& scale, const Operand& zero,
                       int64_t inputs) {
  JOPT_RETURN_IF_WRONG(in_panels("codes", codes, round_up(inputs, kBytes) / kWord, scale[0]));
  if (zero[0] && zero[0] != scale[0]) return wrong("zero", "be empty or (outputs)");
  return ffi::Error::Success();
}

Int8Weights int8_weights(const Operand& codes, const Operand& scale, const Operand& zero,
                         const Index& index) {
  return {at<int8_t>(codes, index), at<float>(scale, index),
          zero[0] ? at<float>(zero, index) : nullptr, codes[1], scale[0]};
}

// zero and fixed may be empty.
ffi::Error Int8(ffi::ThreadPool threads, ffi::Buffer<ffi::F32> x_, ffi::Buffer<ffi::S8> codes_,
                ffi::Buffer<ffi::F32> scale_, ffi::Buffer<ffi::F32> zero_,
                ffi::Buffer<ffi::F32> fixed_, ffi::RemainingArgs ends, Out y_, bool round,
                int64_t which, float low, float high) {
  const Operand x = operand("x", x_, 2), codes = operand("codes", codes_, 4),
                scale = operand("scale", scale_, 1), zero = operand("zero", zero_, 1),
                fixed = operand("fixed", fixed_, 1), y = operand("y", *y_, 2);
  JOPT_RETURN_IF_WRONG(
      checked({x, codes, scale, zero, fixed}, y));
  Ending end{{}, {}, 0, low, high};
  JOPT_RETURN_IF_WRONG(end.read(ends, which, y));
  const int64_t inputs = x[1];
  JOPT_RETURN_IF_WRONG(product(x, inputs, scale[0], y));
  JOPT_RETURN_IF_WRONG(int8_panels(codes, scale, zero, inputs));
  if (fixed[0] > 1) return wrong("fixed", "be empty or one number");
  Pool pool{threads};
  over_batch(x, {codes, scale, zero, fixed}, y, end.together(y),
             [&](const Index& index, int64_t rows) {
    const Int8Weights w = int8_weights(codes, scale, zero, index);
    const float* in = at<float>(x, index);
    float* out = at<float>(y, index);
    const After after = end.after(index);
    if (round)
      run_int8(pool, in, rows, inputs, fixed[0] ? at<float>(fixed, index) : nullptr, w, after, out);
    else
      run_int8_float(pool, in, rows, inputs, w, after, out);
  });
  return ffi::Error::Success();
}

ffi::Error shares(int64_t group) {
  if (group != kBytes && (group < kPair || group % kPair))
    return wrong("group", "be 32 or a multiple of 64");
  return ffi::Error::Success();
}

// zero may be empty.
ffi::Error Int4(ffi::ThreadPool threads, ffi::Buffer<ffi::F32> x_, ffi::Buffer<ffi::U8> packed_,
                ffi::Buffer<ffi::F32> scale_, ffi::Buffer<ffi::F32> zero_, ffi::RemainingArgs ends,
                Out y_, int64_t group, bool round, int64_t which, float low, float high) {
  const Operand x = operand("x", x_, 2), packed = operand("packed", packed_, 4),
                scale = operand("scale", scale_, 4), zero = operand("zero", zero_, 4),
                y = operand("y", *y_, 2);
  JOPT_RETURN_IF_WRONG(checked({x, packed, scale, zero}, y));
  Ending end{{}, {}, 0, low, high};
  JOPT_RETURN_IF_WRONG(end.read(ends, which, y));
  const int64_t inputs = x[1], outputs = y[1];
  JOPT_RETURN_IF_WRONG(product(x, inputs, outputs, y));
  JOPT_RETURN_IF_WRONG(in_panels("packed", packed, round_up(inputs, kPair) / kPair * kBlock, outputs));
  JOPT_RETURN_IF_WRONG(shares(group));
  const int64_t groups = inputs ? (inputs + group - 1) / group : 1;
  auto by_group = [&](const Operand& of) {
    return of[0] == packed[0] && of[1] == groups && of[2] == kPanel && of[3] == 1;
  };
  const bool zeroed = zero.core_size() > 0;
  if (!by_group(scale)) return wrong("scale", "be (panels, groups, 16, 1)");
  if (zeroed && !by_group(zero)) return wrong("zero", "be empty or (panels, groups, 16, 1)");
  Pool pool{threads};
  over_batch(x, {packed, scale, zero}, y, end.together(y),
             [&](const Index& index, int64_t rows) {
    const Int4Weights w{at<uint8_t>(packed, index),
                        at<float>(scale, index),
                        zeroed ? at<float>(zero, index) : nullptr,
                        packed[1],
                        groups,
                        group,
                        outputs};
    auto run = round ? run_int4<Pool> : run_int4_float<Pool>;
    run(pool, at<float>(x, index), rows, inputs, w, end.after(index), at<float>(y, index));
  });
  return ffi::Error::Success();
}

// scale may be empty.
ffi::Error Codebook4(ffi::ThreadPool threads, ffi::Buffer<ffi::F32> x_, ffi::Buffer<ffi::U8> packed_,
                     ffi::Buffer<ffi::F32> scale_, ffi::Buffer<ffi::F32> table_, Out y_,
                     int64_t group, bool round) {
  const Operand x = operand("x", x_, 2), packed = operand("packed", packed_, 2),
                scale = operand("scale", scale_, 2), table = operand("table", table_, 2),
                y = operand("y", *y_, 2);
  JOPT_RETURN_IF_WRONG(checked({x, packed, scale, table}, y));
  const int64_t inputs = x[1], outputs = packed[0];
  JOPT_RETURN_IF_WRONG(product(x, inputs, outputs, y));
  if (packed[1] != round_up(inputs, kPair) / 2) return wrong("packed", "be (outputs, width)");
  JOPT_RETURN_IF_WRONG(shares(group));
  const int64_t groups = inputs ? (inputs + group - 1) / group : 1;
  const bool scaled = scale.core_size() > 0;
  if (scaled && (scale[0] != outputs || scale[1] != groups))
    return wrong("scale", "be empty or (outputs, groups)");
  if (table[1] != 16 || (table[0] != 1 && table[0] != outputs))
    return wrong("table", "be (1 or outputs, 16)");
  Pool pool{threads};
  over_batch(x, {packed, scale, table}, y, true, [&](const Index& index, int64_t rows) {
    const Codebook w{at<uint8_t>(packed, index),
                     packed[1],
                     scaled ? at<float>(scale, index) : nullptr,
                     groups,
                     group,
                     at<float>(table, index),
                     table[0],
                     outputs};
    auto run = round ? run_codebook<Pool> : run_codebook_float<Pool>;
    run(pool, at<float>(x, index), rows, inputs, w, at<float>(y, index));
  });
  return ffi::Error::Success();
}

ffi::Error Signs(ffi::ThreadPool threads, ffi::Buffer<ffi::F32> x_, ffi::Buffer<ffi::U8> bits_,
                 ffi::Buffer<ffi::F32> scale_, Out y_) {
  const Operand x = operand("x", x_, 2), bits = operand("bits", bits_, 2),
                scale = operand("scale", scale_, 1), y = operand("y", *y_, 2);
  JOPT_RETURN_IF_WRONG(checked({x, bits, scale}, y));
  JOPT_RETURN_IF_WRONG(product(x, x[1], bits[0], y));
  if (bits[1] != (x[1] + 31) / 32 * 4) return wrong("bits", "be (outputs, whole words of inputs)");
  if (scale[0] != bits[0]) return wrong("scale", "be (outputs)");
  Pool pool{threads};
  over_batch(x, {bits, scale}, y, true, [&](const Index& index, int64_t rows) {
    const BitWeights w{at<uint8_t>(bits, index), bits[1], at<float>(scale, index), bits[0]};
    run_signs(pool, at<float>(x, index), rows, x[1], w,
              at<float>(y, index));
  });
  return ffi::Error::Success();
}

// The signs of x by those of the weights.
ffi::Error Binary(ffi::ThreadPool threads, ffi::Buffer<ffi::F32> x_, ffi::Buffer<ffi::U8> bits_,
                  ffi::Buffer<ffi::F32> scale_, Out y_) {
  const Operand x = operand("x", x_, 2), bits = operand("bits", bits_, 2),
                scale = operand("scale", scale_, 1), y = operand("y", *y_, 2);
  JOPT_RETURN_IF_WRONG(checked({x, bits, scale}, y));
  JOPT_RETURN_IF_WRONG(product(x, x[1], bits[0], y));
  if (bits[1] != (x[1] + 31) / 32 * 4) return wrong("bits", "be (outputs, whole words of inputs)");
  if (scale[0] != bits[0]) return wrong("scale", "be (outputs)");
  Pool pool{threads};
  over_batch(x, {bits, scale}, y, true, [&](const Index& index, int64_t rows) {
    const BitWeights w{at<uint8_t>(bits, index), bits[1], at<float>(scale, index), bits[0]};
    const auto signs = packed_signs(pool, at<float>(x, index), rows, x[1], bits[1]);
    run_binary(pool, signs.get(), nullptr, rows, x[1], w, at<float>(y, index));
  });
  return ffi::Error::Success();
}

// scale may be empty.
ffi::Error Sparse(ffi::ThreadPool threads, ffi::Buffer<ffi::F32> x_, ffi::AnyBuffer values_,
                  ffi::Buffer<ffi::U8> columns_, ffi::Buffer<ffi::S32> starts_,
                  ffi::Buffer<ffi::F32> scale_, Out y_, bool round) {
  const bool coded = values_.element_type() == ffi::S8;
  if (!coded && values_.element_type() != ffi::F32) return wrong("values", "be float32 or int8");
  const Operand x = operand("x", x_, 2), values = operand("values", values_, 1),
                columns = operand("columns", columns_, 1), starts = operand("starts", starts_, 1),
                scale = operand("scale", scale_, 1), y = operand("y", *y_, 2);
  JOPT_RETURN_IF_WRONG(checked({x, values, columns, starts, scale}, y));
  const int64_t outputs = y[1], blocks = round_up(x[1], kSparseBlock) / kSparseBlock;
  if (starts[0] != outputs * blocks + 1)
    return wrong("starts", "be (outputs * blocks + 1), by blocks of 256 inputs");
  JOPT_RETURN_IF_WRONG(product(x, x[1], outputs, y));
  if (columns[0] != values[0]) return wrong("columns", "be as many as the values");
  if (scale[0] && scale[0] != outputs) return wrong("scale", "be empty or (outputs)");
  if (round && !coded) return wrong("values", "be int8 where inputs are rounded");
  Pool pool{threads};
  bool right = true;
  over_batch(x, {values, columns, starts, scale}, y, true, [&](const Index& index, int64_t rows) {
    const SparseWeights w{values.at(index),
                          coded,
                          scale[0] ? at<float>(scale, index) : nullptr,
                          at<uint8_t>(columns, index),
                          at<int32_t>(starts, index),
                          outputs,
                          blocks,
                          values[0]};
    right = run_sparse(pool, at<float>(x, index), rows, x[1], round, w, at<float>(y, index)) && right;
  });
  if (!right) return wrong("starts", "rise within the entries");
  return ffi::Error::Success();
}

// By floats, as XLA's own products; the kernel is (inputs, outputs).
ffi::Error Product(ffi::ThreadPool threads, ffi::Buffer<ffi::F32> x_, ffi::Buffer<ffi::F32> kernel_,
                   ffi::RemainingArgs ends, Out y_, int64_t which, float low, float high) {
  const Operand x = operand("x", x_, 2), kernel = operand("kernel", kernel_, 2),
                y = operand("y", *y_, 2);
  JOPT_RETURN_IF_WRONG(checked({x, kernel}, y));
  Ending end{{}, {}, 0, low, high};
  JOPT_RETURN_IF_WRONG(end.read(ends, which, y));
  if (x[1] != kernel[0]) return wrong("x", "have as many inputs as the weights");
  if (y[0] != x[0] || y[1] != kernel[1]) return wrong("the result", "be (rows, outputs)");
  Pool pool{threads};
  over_batch(x, {kernel}, y, end.together(y),
             [&](const Index& index, int64_t rows) {
    const FloatWeights w{at<float>(kernel, index), kernel[1]};
    run_floats(pool, at<float>(x, index), rows, kernel[0], w, end.after(index), at<float>(y, index));
  });
  return ffi::Error::Success();
}

// Calls run(index, window) for each image of the leading axes, where the shapes fit.
template <class Run>
ffi::Error over_windows(const Operand& x, int64_t rows, int64_t columns, const Operand& y,
                        ffi::Span<const int64_t> strides, ffi::Span<const int64_t> padding,
                        const Run& run) {
  if (strides.size() != 2 || strides[0] < 1 || strides[1] < 1)
    return wrong("strides", "be two numbers, at least 1");
  if (padding.size() != 2 || padding[0] < 0 || padding[1] < 0)
    return wrong("padding", "be two numbers, at least 0");
  if (y[0] != x[0]) return wrong("the result", "have x's batch");
  const Window window{x[0],       x[1],       x[2],       x[3],       rows, columns,
                      strides[0], strides[1], padding[0], padding[1], y[1], y[2]};
  over_leads(y, [&](const Index& index) { run(index, window); });
  return ffi::Error::Success();
}

ffi::Error Convolution(ffi::ThreadPool threads, ffi::Buffer<ffi::F32> x_,
                       ffi::Buffer<ffi::F32> kernel_, ffi::RemainingArgs ends, Out y_,
                       ffi::Span<const int64_t> strides, ffi::Span<const int64_t> padding,
                       int64_t which, float low, float high) {
  const Operand x = operand("x", x_, 4), kernel = operand("kernel", kernel_, 4),
                y = operand("y", *y_, 4);
  JOPT_RETURN_IF_WRONG(checked({x, kernel}, y));
  Ending end{{}, {}, 0, low, high};
  JOPT_RETURN_IF_WRONG(end.read(ends, which, y));
  if (kernel[2] != x[3]) return wrong("kernel", "be (rows, columns, channels, outputs)");
  if (y[3] != kernel[3]) return wrong("the result", "have the kernel's outputs");
  Pool pool{threads};
  return over_windows(x, kernel[0], kernel[1], y, strides, padding,
                      [&](const Index& index, const Window& window) {
    const FloatWeights w{at<float>(kernel, index), kernel[3]};
    run_convolution(pool, at<float>(x, index), w, end.after(index), window, at<float>(y, index));
  });
}

// zero may be empty; the codes of an output are those of its window, row by row.
ffi::Error Int8Convolution(ffi::ThreadPool threads, ffi::Buffer<ffi::F32> x_,
                           ffi::Buffer<ffi::S8> codes_, ffi::Buffer<ffi::F32> scale_,
                           ffi::Buffer<ffi::F32> zero_, ffi::RemainingArgs ends, Out y_,
                           ffi::Span<const int64_t> size, ffi::Span<const int64_t> strides,
                           ffi::Span<const int64_t> padding, int64_t which, float low, float high) {
  const Operand x = operand("x", x_, 4), codes = operand("codes", codes_, 4),
                scale = operand("scale", scale_, 1), zero = operand("zero", zero_, 1),
                y = operand("y", *y_, 4);
  JOPT_RETURN_IF_WRONG(checked({x, codes, scale, zero}, y));
  Ending end{{}, {}, 0, low, high};
  JOPT_RETURN_IF_WRONG(end.read(ends, which, y));
  if (size.size() != 2 || size[0] < 1 || size[1] < 1)
    return wrong("size", "be two numbers, at least 1");
  JOPT_RETURN_IF_WRONG(int8_panels(codes, scale, zero, size[0] * size[1] * x[3]));
  if (y[3] != scale[0]) return wrong("the result", "have the codes' outputs");
  Pool pool{threads};
  return over_windows(x, size[0], size[1], y, strides, padding,
                      [&](const Index& index, const Window& window) {
    const Int8Weights w = int8_weights(codes, scale, zero, index);
    run_int8_convolution(pool, at<float>(x, index), w, end.after(index), window,
                         at<float>(y, index));
  });
}

ffi::Error Depthwise(ffi::ThreadPool threads, ffi::Buffer<ffi::F32> x_,
                     ffi::Buffer<ffi::F32> kernel_, ffi::RemainingArgs ends, Out y_,
                     ffi::Span<const int64_t> strides, ffi::Span<const int64_t> padding,
                     int64_t which, float low, float high) {
  const Operand x = operand("x", x_, 4), kernel = operand("kernel", kernel_, 3),
                y = operand("y", *y_, 4);
  JOPT_RETURN_IF_WRONG(checked({x, kernel}, y));
  Ending end{{}, {}, 0, low, high};
  JOPT_RETURN_IF_WRONG(end.read(ends, which, y));
  if (kernel[2] != x[3]) return wrong("kernel", "be (rows, columns, channels)");
  if (y[3] != x[3]) return wrong("the result", "have x's channels");
  Pool pool{threads};
  return over_windows(x, kernel[0], kernel[1], y, strides, padding,
                      [&](const Index& index, const Window& window) {
    run_depthwise(pool, at<float>(x, index), at<float>(kernel, index), end.after(index), window,
                  at<float>(y, index));
  });
}

}  // namespace
}  // namespace jopt

#define JOPT_PRODUCT() ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::Buffer<ffi::F32>>()
#define JOPT_ENDED() RemainingArgs().Ret<ffi::Buffer<ffi::F32>>()
#define JOPT_BOUNDS() Attr<int64_t>("which").Attr<float>("low").Attr<float>("high")

XLA_FFI_DEFINE_HANDLER_SYMBOL(JoptInt8, jopt::Int8,
                              JOPT_PRODUCT()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .JOPT_ENDED()
                                  .Attr<bool>("round")
                                  .JOPT_BOUNDS());
XLA_FFI_DEFINE_HANDLER_SYMBOL(JoptInt4, jopt::Int4,
                              JOPT_PRODUCT()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .JOPT_ENDED()
                                  .Attr<int64_t>("group")
                                  .Attr<bool>("round")
                                  .JOPT_BOUNDS());
XLA_FFI_DEFINE_HANDLER_SYMBOL(JoptCodebook, jopt::Codebook4,
                              JOPT_PRODUCT()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("group")
                                  .Attr<bool>("round"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(JoptSigns, jopt::Signs,
                              JOPT_PRODUCT()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(JoptBinary, jopt::Binary,
                              JOPT_PRODUCT()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(JoptSparse, jopt::Sparse,
                              JOPT_PRODUCT()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<bool>("round"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(JoptFloats, jopt::Product,
                              JOPT_PRODUCT()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .JOPT_ENDED()
                                  .JOPT_BOUNDS());
XLA_FFI_DEFINE_HANDLER_SYMBOL(JoptConvolution, jopt::Convolution,
                              JOPT_PRODUCT()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .JOPT_ENDED()
                                  .Attr<ffi::Span<const int64_t>>("strides")
                                  .Attr<ffi::Span<const int64_t>>("padding")
                                  .JOPT_BOUNDS());

XLA_FFI_DEFINE_HANDLER_SYMBOL(JoptInt8convolution, jopt::Int8Convolution,
                              JOPT_PRODUCT()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .JOPT_ENDED()
                                  .Attr<ffi::Span<const int64_t>>("size")
                                  .Attr<ffi::Span<const int64_t>>("strides")
                                  .Attr<ffi::Span<const int64_t>>("padding")
                                  .JOPT_BOUNDS());
XLA_FFI_DEFINE_HANDLER_SYMBOL(JoptDepthwise, jopt::Depthwise,
                              JOPT_PRODUCT()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .JOPT_ENDED()
                                  .Attr<ffi::Span<const int64_t>>("strides")
                                  .Attr<ffi::Span<const int64_t>>("padding")
                                  .JOPT_BOUNDS());

extern "C" const char* jopt_instructions() { return jopt::kInstructions; }
