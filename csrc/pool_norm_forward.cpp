// Traffic: each patch is read once from memory, and again from the cache for every further cell whose
// window holds it; each cell is written once. A cell's sums stay in the first cache until they are
// normalised.
#include <cmath>

#include "pool_norm.h"
#include "pool_walk.h"
#include "threads.h"

namespace tokenflex {
namespace {

template <class T>
void sum_window(const PoolNormForward& job, const Image& image, const Window& rows,
                const Window& columns, SumOf<T>* sums) {
  using Sum = SumOf<T>;
  const double* weights_h = job.tables.weights + rows.weights;
  const double* weights_w = job.tables.weights + columns.weights;
  RowCollector<T> patches(job.tables.weighted);
  bool adds = false;
  const auto sum_up = [&](const RowSum<T>& some) {
    add_rows(some, adds, sums, job.width);
    adds = true;
  };
  for (int64_t c = 0; c < columns.count; ++c) {
    for (int64_t r = 0; r < rows.count; ++r) {
      const int64_t at = image.patch(rows.first + r, columns.first + c);
      const T* patch = reinterpret_cast<const T*>(job.x.row(at));
      patches.add(patch, Sum(weights_h[r] * weights_w[c]), sum_up);
    }
    if (c + 1 < columns.count) patches.flush(sum_up);
  }
  sum_up(patches.rest());
}

// U is the type of the result, whose sums are of the type that those of T are of.
template <class T, class U>
class Forward {
 public:
  Forward(const PoolNormForward& job)
      : job_(job),
        scale_(widened_vector<Sum>(job.weight, job.width)),
        shift_(widened_vector<Sum>(job.bias, job.width)) {}

  void run(int threads) const {
    const int64_t patches = job_.tables.num_patches;
    const int64_t bytes = patches * job_.width * int64_t(sizeof(T));
    const int64_t parts = worthwhile_parts(patches, bytes, threads);
    std::vector<Sum> sums(static_cast<size_t>(parts * job_.width));
    in_parts(parts, parts, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        pool_part(part_of(job_.tables, part, parts), sums.data() + part * job_.width);
      }
    });
  }

 private:
  using Sum = SumOf<T>;

  void pool_part(Part part, Sum* sums) const {
    for_images(job_.tables, part, [&](const Image& image) {
      for (int64_t i = 0; i < image.out_h; ++i) {
        if (!part.holds(image.patch(image.windows_h[i].first, 0))) continue;
        for (int64_t j = 0; j < image.out_w; ++j) pool_cell(image, i, j, sums);
      }
    });
  }

  void pool_cell(const Image& image, int64_t i, int64_t j, Sum* sums) const {
    const Window &rows = image.windows_h[i], &columns = image.windows_w[j];
    sum_window<T>(job_, image, rows, columns, sums);
    Sum area = Sum(int64_t(rows.divisor) * columns.divisor);
    const int64_t cell = image.cell(i, j), width = job_.width;
    U* out = static_cast<U*>(job_.out) + cell * width;
    if (!job_.weight.data) return write_average(sums, area, out, width);

    Moments<Sum> of = moments(sums, width);  // of the sums: the area cancels, but for eps
    if (!std::isfinite(of.variance)) {         // that of the averages may be
      for (int64_t k = 0; k < width; ++k) sums[k] /= area;
      area = 1;
      of = moments(sums, width);
    }
    const Sum inverse = 1 / std::sqrt(of.variance + area * area * Sum(job_.eps));
    U* normalised = nullptr;
    if (job_.normalised) {
      normalised = static_cast<U*>(job_.normalised) + cell * width;
      static_cast<Sum*>(job_.inverse_std)[cell] = inverse * area;
    }
    write_norm(sums, of.mean, inverse, scale_.data(), shift_.data(), normalised, out, width);
  }

  const PoolNormForward& job_;
  std::vector<Sum> scale_, shift_;
};

template <class T>
void scale_shift_of(const T* normalised, int64_t rows, int64_t width, const Parameter& weight,
                    const Parameter& bias, T* out, int threads) {
  using Sum = SumOf<T>;
  const std::vector<Sum> scale = widened_vector<Sum>(weight, width);
  const std::vector<Sum> shift = widened_vector<Sum>(bias, width);
  const int64_t parts = worthwhile_parts(rows, 2 * rows * width * int64_t(sizeof(T)), threads);
  std::vector<Sum> scratch(static_cast<size_t>(parts * width));
  in_parts(parts, parts, [&](int64_t begin, int64_t end) {
    Sum* row = scratch.data() + begin * width;
    for (int64_t at = rows * begin / parts; at < rows * end / parts; ++at) {
      add_rows(RowSum<T>{{normalised + at * width}, {}, 1, false}, false, row, width);
      write_norm<T>(row, 0, 1, scale.data(), shift.data(), nullptr, out + at * width, width);
    }
  });
}

}  // namespace

void pool_norm_forward(const PoolNormForward& job, int threads) {
  with_dtype(job.dtype, [&](auto element) {
    using T = decltype(element);
    with_dtype_of_sums<SumOf<T>>(job.out_dtype, [&](auto out_element) {
      Forward<T, decltype(out_element)>(job).run(threads);
    });
  });
}

void scale_shift(const void* normalised, const std::string& dtype, int64_t rows, int64_t width,
                 const Parameter& weight, const Parameter& bias, void* out, int threads) {
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    scale_shift_of(static_cast<const T*>(normalised), rows, width, weight, bias,
                   static_cast<T*>(out), threads);
  });
}

}  // namespace tokenflex
