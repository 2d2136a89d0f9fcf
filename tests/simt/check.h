// Judging an emulated kernel: both thread orders, and every barrier's worth.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <random>

#include "common/cuda.cuh"
#include "fence.h"

namespace check {

template <class T>
using vector = std::vector<T, fence::Allocator<T>>;

inline bool all_passed = true;
inline const bool every_barrier = !std::getenv("GAPKERN_SIMT_ERRORS");  // set: errors alone, a tenth of the time
inline std::mt19937_64 generator(20261124);

inline void report(bool passed, const std::string& name, const std::string& what) {
  std::printf("%s %s: %s\n", passed ? "passed" : "FAILED", name.c_str(), what.c_str());
  std::fflush(stdout);
  all_passed = all_passed && passed;
}

inline std::string digits(double x) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1e", x);
  return text;
}

inline double normal() { return std::normal_distribution<double>()(generator); }

template <class T>
vector<T> random(size_t count, double spread = 1) {
  vector<T> values(count);
  for (T& v : values) gapkern::from_wide(typename gapkern::Wide<T>::type(spread * normal()), &v);
  return values;
}

// Results start as NaN (integers as -1): what a kernel forgets to write is found.
template <class T>
vector<T> poisoned(size_t count) {
  vector<T> values(count);
  std::memset(static_cast<void*>(values.data()), 0xff, count * sizeof(T));
  return values;
}

// Largest |ours - truth| / (|truth| + floor); infinite where one is NaN and the other is not.
template <class T>
double error(const vector<T>& ours, const vector<double>& truth, double floor = 1e-30) {
  double worst = ours.size() == truth.size() ? 0 : INFINITY;
  for (size_t i = 0; i < truth.size() && i < ours.size(); ++i) {
    const double a = double(gapkern::to_wide(ours[i]));
    if (std::isnan(a) || std::isnan(truth[i])) {
      if (std::isnan(a) != std::isnan(truth[i])) return INFINITY;
    } else if (a != truth[i]) {
      worst = std::max(worst, std::abs(a - truth[i]) / (std::abs(truth[i]) + floor));
    }
  }
  return worst;
}

// The largest; infinite where one is NaN, which std::max would pass over.
inline double largest(std::initializer_list<double> errors) {
  double worst = 0;
  for (const double e : errors) worst = e <= worst ? worst : std::isnan(e) ? INFINITY : e;
  return worst;
}

// `attempt` launches a kernel on fresh results and returns its error. It must be within `tolerance` with the threads of
// every block in either order, and must not be once any one of the barriers is left out.
inline void kernel(const std::string& name, double tolerance, const std::function<double()>& attempt) {
  const auto fails = [&] {
    for (bool reversed : {false, true}) {
      simt::reversed = reversed;
      try {
        if (!(attempt() <= tolerance)) return true;
      } catch (const std::runtime_error&) {
        return true;
      }
    }
    return false;
  };
  simt::barriers.clear();
  simt::skipped = {};
  double worst = 0;
  std::string trouble;
  for (bool reversed : {false, true}) {
    simt::reversed = reversed;
    try {
      const double found = attempt();
      worst = found <= worst ? worst : found;
    } catch (const std::runtime_error& problem) {
      trouble = problem.what();
      worst = INFINITY;
    }
  }
  report(worst <= tolerance, name, trouble.empty() ? "error " + digits(worst) : trouble);
  if (!every_barrier) return;
  for (const simt::Site& site : std::set<simt::Site>(simt::barriers)) {
    simt::skipped = site;
    report(fails(), name, "the barrier at " + site.text() + " is needed");
  }
  simt::skipped = {};
}

inline int result() { return all_passed ? 0 : 1; }

}  // namespace check
