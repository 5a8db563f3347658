// What XLA calls. Every shape is checked before a pointer is touched.

#include <string>
#include <tuple>

#include "../../native/pool.h"
#include "select.h"

namespace ffi = xla::ffi;

namespace jopt {
namespace {

ffi::Error wrong(const std::string& words) {
  return ffi::Error::InvalidArgument("jopt: " + words + ".");
}

// An operand whose leading axes run over selections, each of them equal to the result's or 1.
struct Array {
  const char* data;
  ffi::AnyBuffer::Dimensions dims;
  std::size_t lead;
  int64_t size;  // of a selection

  // Where the part of a selection begins, in elements.
  int64_t at(int64_t selection, const std::vector<int64_t>& batch) const {
    int64_t place = 0, step = 1;
    for (std::size_t axis = lead; axis-- > 0; selection /= batch[axis]) {
      if (dims[axis] != 1) place += selection % batch[axis] * step;
      step *= dims[axis];
    }
    return place * size;
  }
};

ffi::Error Select(ffi::ThreadPool threads, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  if (args.size() < 2 || rets.size() + 1 != args.size())
    return wrong("there must be a number, and as many scores as marks");
  const auto number = args.get<ffi::Buffer<ffi::S32>>(0);
  if (!number.has_value()) return wrong("keep must be int32");
  const std::size_t lead = number->dimensions().size();
  std::vector<Array> scores;
  std::vector<bool*> marks;
  std::vector<int64_t> batch;
  for (std::size_t i = 0; i < rets.size(); ++i) {
    const auto own = args.get<ffi::Buffer<ffi::F32>>(i + 1);
    auto made = rets.get<ffi::Buffer<ffi::PRED>>(i);
    if (!own.has_value() || !made.has_value()) return wrong("scores must be float32, marks boolean");
    const auto from = own->dimensions(), to = (*made)->dimensions();
    if (from.size() != lead + 1 || to.size() != lead + 1 || from[lead] != to[lead])
      return wrong("scores and marks must have one axis more than keep, of one length");
    if (i == 0) batch.assign(to.begin(), to.begin() + lead);
    for (std::size_t axis = 0; axis < lead; ++axis)
      if (to[axis] != batch[axis] || (from[axis] != 1 && from[axis] != batch[axis]))
        return wrong("leading axes must be equal, or one");
    scores.push_back({(const char*)own->untyped_data(), from, lead, from[lead]});
    marks.push_back((*made)->typed_data());
  }
  const Array keep{(const char*)number->untyped_data(), number->dimensions(), lead, 1};
  int64_t selections = 1;
  for (std::size_t axis = 0; axis < lead; ++axis) {
    if (keep.dims[axis] != 1 && keep.dims[axis] != batch[axis])
      return wrong("leading axes must be equal, or one");
    selections *= batch[axis];
  }
  const auto select = [&](auto& pool, int64_t selection) {
    std::vector<Leaf> leaves;
    for (std::size_t i = 0; i < scores.size(); ++i)
      leaves.push_back({(const int32_t*)scores[i].data + scores[i].at(selection, batch),
                        marks[i] + selection * scores[i].size, scores[i].size});
    keep_largest(pool, leaves, ((const int32_t*)keep.data)[keep.at(selection, batch)]);
  };
  Pool pool{threads};
  if (selections == 1) {
    select(pool, 0);
  } else {
    parallel_for(pool, selections, [&](int64_t selection) {
      Alone alone;
      select(alone, selection);
    });
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jopt

XLA_FFI_DEFINE_HANDLER_SYMBOL(JoptSelect, jopt::Select,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .RemainingRets());
