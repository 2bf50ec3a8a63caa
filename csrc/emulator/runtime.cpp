// SPDX-License-Identifier: Apache-2.0
// Fibers and what they wait for; runtime.h says what is modelled.

#include "emulator/runtime.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <stdexcept>
#include <vector>

namespace lowbit::emulator {
namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr int kSharedAlignment = 1024;
constexpr uint8_t kPoison = 0xCC;
constexpr int kWarp = 32;

struct Meeting {  // of one group of lanes; lives as long as its block
  const char* what = nullptr;
  int arrived = 0;
  uint64_t generation = 0;
  std::vector<void*> arguments;
};

struct Barrier {
  int arrived = 0, expected = 0;
  uint64_t generation = 0;
};

struct Groups {
  std::vector<std::function<void()>> open;
  std::deque<std::vector<std::function<void()>>> committed;
};

struct Block {
  uint8_t* smem = nullptr;
  std::map<std::pair<int, int>, Meeting> meetings;  // (lanes, index of the group)
  std::map<int, Barrier> barriers;
};

struct Fiber {
  Thread thread;
  Block* block = nullptr;
  void* stack = nullptr;
  ucontext_t context;
  jmp_buf resume;
  bool started = false, done = false;
  const char* waits_for = nullptr;
  std::function<bool()> ready;
  Groups groups[3];  // by Engine
};

struct Async {
  uint64_t order;
  std::function<void()> copy;
};

struct Scheduler {
  Launched launch;
  const std::function<void()>* body = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<std::unique_ptr<Block>> blocks;
  Barrier cluster;
  std::deque<Async> queue;
  Fiber* running = nullptr;
  jmp_buf home;
  std::exception_ptr error;
  uint64_t random = 88172645463325252ull;  // xorshift: runs repeat

  uint64_t next_random() {
    random ^= random << 13;
    random ^= random >> 7;
    random ^= random << 17;
    return random;
  }
};

thread_local Scheduler* scheduler = nullptr;

// Stacks are kept: mapping one costs more than running a small thread on it.
std::vector<void*>& free_stacks() {
  static thread_local std::vector<void*> stacks;
  return stacks;
}

void* take_stack() {
  auto& stacks = free_stacks();
  if (stacks.empty()) {
    void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) throw std::runtime_error("the emulator has no memory for a stack");
    return stack;
  }
  void* stack = stacks.back();
  stacks.pop_back();
  return stack;
}

void yield() {
  if (_setjmp(scheduler->running->resume) == 0) _longjmp(scheduler->home, 1);
}

void fiber_main() {
  Fiber* self = scheduler->running;
  try {
    (*scheduler->body)();
    for (Groups& groups : self->groups) {
      if (!groups.open.empty() || !groups.committed.empty()) {
        misused("exit", "the thread ends with copies or matrix products it did not wait for");
      }
    }
  } catch (...) {
    if (!scheduler->error) scheduler->error = std::current_exception();
  }
  self->done = true;
  _longjmp(scheduler->home, 1);
}

void resume(Fiber* fiber) {
  scheduler->running = fiber;
  if (_setjmp(scheduler->home) == 0) {
    if (fiber->started) _longjmp(fiber->resume, 1);
    fiber->started = true;
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack;
    fiber->context.uc_stack.ss_size = kStackBytes;
    fiber->context.uc_link = nullptr;
    makecontext(&fiber->context, fiber_main, 0);
    setcontext(&fiber->context);
  }
  scheduler->running = nullptr;
}

// Does one queued copy, any whose predecessors of the same order are done.
void do_one_async() {
  auto& queue = scheduler->queue;
  size_t pick = scheduler->next_random() % queue.size();
  const uint64_t order = queue[pick].order;
  for (size_t i = 0; order != 0 && i < pick; ++i) {
    if (queue[i].order == order) pick = i;
  }
  std::function<void()> copy = std::move(queue[pick].copy);
  queue.erase(queue.begin() + pick);
  copy();
}

std::string stuck() {
  std::map<std::string, int> waiting;
  for (const auto& fiber : scheduler->fibers) {
    if (!fiber->done) ++waiting[fiber->waits_for ? fiber->waits_for : "?"];
  }
  std::string text = "deadlock:";
  for (const auto& [what, count] : waiting) {
    text += " " + std::to_string(count) + " threads in " + what + ";";
  }
  return text;
}

void run_cluster(uint3 first) {
  Scheduler& s = *scheduler;
  const dim3 size = s.launch.block;
  const int threads = size.x * size.y * size.z;
  s.fibers.clear();
  s.blocks.clear();
  s.cluster = Barrier();
  for (int rank = 0; rank < s.launch.cluster; ++rank) {
    auto block = std::make_unique<Block>();
    if (s.launch.smem_bytes > 0) {
      const size_t bytes = (s.launch.smem_bytes + kSharedAlignment - 1) & -kSharedAlignment;
      block->smem = static_cast<uint8_t*>(aligned_alloc(kSharedAlignment, bytes));
      memset(block->smem, kPoison, bytes);
    }
    for (int i = 0; i < threads; ++i) {
      auto fiber = std::make_unique<Fiber>();
      const unsigned linear = i;
      fiber->thread.thread_idx = {linear % size.x, linear / size.x % size.y,
                                  linear / (size.x * size.y)};
      fiber->thread.block_idx = {first.x + rank, first.y, first.z};
      fiber->thread.linear = i;
      fiber->thread.cluster_rank = rank;
      fiber->block = block.get();
      fiber->stack = take_stack();
      s.fibers.push_back(std::move(fiber));
    }
    s.blocks.push_back(std::move(block));
  }

  // Rounds over the fibers, beginning somewhere else each time; copies happen in between, or
  // when nothing else can.
  size_t left = s.fibers.size();
  while (left > 0 && !s.error) {
    bool progress = false;
    const size_t start = s.next_random() % s.fibers.size();
    for (size_t i = 0; i < s.fibers.size() && !s.error; ++i) {
      Fiber* fiber = s.fibers[(start + i) % s.fibers.size()].get();
      if (fiber->done || (fiber->ready && !fiber->ready())) continue;
      fiber->ready = nullptr;
      fiber->waits_for = nullptr;
      resume(fiber);
      progress = true;
      left -= fiber->done;
    }
    if (!s.queue.empty() && (!progress || s.next_random() % 2)) {
      do_one_async();
      progress = true;
    }
    if (!progress && left > 0 && !s.error) {
      s.error = std::make_exception_ptr(std::runtime_error(stuck()));
    }
  }
  while (!s.queue.empty() && !s.error) do_one_async();  // stores that nobody had to wait for
  s.queue.clear();
  for (auto& fiber : s.fibers) free_stacks().push_back(fiber->stack);
  for (auto& block : s.blocks) free(block->smem);
}

}  // namespace

const Thread& current() { return scheduler->running->thread; }
const Launched& launched() { return scheduler->launch; }

void misused(const char* what, const std::string& why) {
  throw std::runtime_error(std::string(what) + ": " + why);
}

void run(const Launched& launch, const std::function<void()>& thread_body) {
  Scheduler s;
  s.launch = launch;
  s.body = &thread_body;
  if (launch.grid.x % launch.cluster) misused("launch", "the grid is no multiple of the cluster");
  scheduler = &s;
  for (unsigned z = 0; z < launch.grid.z && !s.error; ++z) {
    for (unsigned y = 0; y < launch.grid.y && !s.error; ++y) {
      for (unsigned x = 0; x < launch.grid.x && !s.error; x += launch.cluster) {
        run_cluster({x, y, z});
      }
    }
  }
  scheduler = nullptr;
  if (s.error) std::rethrow_exception(s.error);
}

uint8_t* shared_memory(int cluster_rank) {
  if (cluster_rank < 0) return scheduler->running->block->smem;
  return scheduler->blocks.at(cluster_rank)->smem;
}

uint32_t shared_address(const void* pointer) {
  const auto offset = static_cast<const uint8_t*>(pointer) - shared_memory();
  if (offset < 0 || offset > scheduler->launch.smem_bytes) {
    misused("shared_address", "not in the block's dynamic shared memory");
  }
  return static_cast<uint32_t>(offset);
}

uint8_t* shared_pointer(uint32_t address, int bytes, const char* what) {
  if (address % std::min(bytes, 16) != 0) {
    misused(what, "shared address " + std::to_string(address) + " is not aligned");
  }
  if (address + bytes > static_cast<uint32_t>(scheduler->launch.smem_bytes)) {
    misused(what, "shared address " + std::to_string(address) + " + " + std::to_string(bytes) +
                      " is past " + std::to_string(scheduler->launch.smem_bytes));
  }
  return shared_memory() + address;
}

void wait(const char* what, const std::function<bool()>& ready) {
  if (ready()) return;
  Fiber* self = scheduler->running;
  self->waits_for = what;
  self->ready = ready;
  yield();
}

void collective(const char* what, int lanes, void* argument,
                const std::function<void(void* const*)>& body) {
  Fiber* self = scheduler->running;
  const int linear = self->thread.linear;
  Meeting& meeting = self->block->meetings[{lanes, linear / lanes}];
  if (meeting.arguments.empty()) meeting.arguments.resize(lanes);
  if (meeting.arrived > 0 && strcmp(meeting.what, what) != 0) {
    misused(what, std::string("other lanes of the group are in ") + meeting.what);
  }
  meeting.what = what;
  meeting.arguments[linear % lanes] = argument;
  if (++meeting.arrived == lanes) {
    meeting.arrived = 0;
    ++meeting.generation;
    body(meeting.arguments.data());
    return;
  }
  const uint64_t generation = meeting.generation;
  wait(what, [&meeting, generation] { return meeting.generation != generation; });
}

namespace {
void meet(const char* what, Barrier& barrier, int threads) {
  if (barrier.arrived > 0 && barrier.expected != threads) {
    misused(what, "threads of one barrier expect different numbers of threads");
  }
  barrier.expected = threads;
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  const uint64_t generation = barrier.generation;
  wait(what, [&barrier, generation] { return barrier.generation != generation; });
}
}  // namespace

void block_barrier(int id, int threads) {
  if (threads % kWarp != 0 || id < 0 || id > 15) misused("bar.sync", "a barrier that is not");
  meet("bar.sync", scheduler->running->block->barriers[id], threads);
}

void cluster_barrier() {
  meet("barrier.cluster", scheduler->cluster, static_cast<int>(scheduler->fibers.size()));
}

void queue_async(uint64_t order, std::function<void()> copy) {
  scheduler->queue.push_back({order, std::move(copy)});
}

void defer(Engine engine, std::function<void()> work) {
  scheduler->running->groups[static_cast<int>(engine)].open.push_back(std::move(work));
}

void commit(Engine engine) {
  Groups& groups = scheduler->running->groups[static_cast<int>(engine)];
  groups.committed.push_back(std::move(groups.open));
  groups.open.clear();
}

void wait_group(Engine engine, int pending) {
  Groups& groups = scheduler->running->groups[static_cast<int>(engine)];
  while (static_cast<int>(groups.committed.size()) > pending) {
    for (auto& work : groups.committed.front()) work();
    groups.committed.pop_front();
  }
}

}  // namespace lowbit::emulator
