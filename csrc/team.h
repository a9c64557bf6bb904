// Work shared by the threads of one call.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace m2rl {

// fn(task, thread) for every task, handed out in order; the caller is thread 0. Where the system refuses another thread
// (a limit on processes), those there are do the work.
template <typename F>
void parallel_for(int64_t tasks, int threads, F&& fn) {
  threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, tasks)));
  if (threads == 1) {
    for (int64_t i = 0; i < tasks; ++i) fn(i, 0);
    return;
  }
  std::atomic<int64_t> next{0};
  auto work = [&](int thread) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) fn(i, thread);
  };
  std::vector<std::thread> team;
  team.reserve(static_cast<size_t>(threads));
  try {
    for (int t = 1; t < threads; ++t) team.emplace_back(work, t);
  } catch (const std::system_error&) {
  }
  work(0);
  for (auto& member : team) member.join();
}

}  // namespace m2rl
