// Large CPU tensors in pages of our own, so that a process never holds more of them than its tensors needed at once.
//
// A C library keeps what is freed in holes that the next tensors often don't fit into, and doesn't foresee how many more are
// to come. Here a freed block waits for the next tensor: the smallest one that is large enough is cut to size. If there is none,
// the largest grows: its pages move, and only what it lacks is new. What is then held beyond the most that was ever
// in use goes back to the system, the smallest blocks first. A training step asks for the same again and again, so
// that after a few of them no page is taken or given back.

#include <c10/core/CPUAllocator.h>
#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <mutex>
#include <set>
#include <unordered_map>
#include <utility>

namespace {

constexpr size_t kPage = 4096;
constexpr size_t kAlignment = 64;  // of what the C library gives, as PyTorch's own allocator asks for it
constexpr size_t kLarge = 256 << 10;  // smaller ones are left to the C library

class Pages {
 public:
  std::mutex mutex;

  // A block of `size` bytes, a multiple of the page; null where there is no memory.
  char* take(size_t size) {
    char* at = fitting(size);
    if (!at && held() + size > peak_) at = grown(size);
    if (!at) at = fresh(size);
    if (!at) return nullptr;
    used_.emplace(at, size);
    live_ += size;
    peak_ = std::max(peak_, live_);
    release(held() - std::min(held(), peak_));
    return at;
  }

  // Whether the block is one of these; it waits for the next tensor then.
  bool give(char* at) {
    auto found = used_.find(at);
    if (found == used_.end()) return false;
    size_t size = found->second;
    used_.erase(found);
    live_ -= size;
    keep(at, size);
    return true;
  }

  void count(uint64_t* out) const { out[0] = live_, out[1] = waiting_, out[2] = peak_, out[3] = taken_; }

 private:
  size_t held() const { return live_ + waiting_; }

  char* fitting(size_t size) {
    auto found = by_size_.lower_bound({size, nullptr});
    if (found == by_size_.end()) return nullptr;
    auto [have, at] = *found;
    drop(at, have);
    if (have > size) keep(at + size, have - size);
    return at;
  }

  char* grown(size_t size) {
    if (by_size_.empty()) return nullptr;
    auto [have, at] = *by_size_.rbegin();
    void* moved = mremap(at, have, size, MREMAP_MAYMOVE);
    if (moved == MAP_FAILED) return nullptr;  // as for a block whose parts the kernel keeps apart
    drop(at, have);
    taken_ += size - have;
    return static_cast<char*>(moved);
  }

  char* fresh(size_t size) {
    void* at = map(size);
    if (at == MAP_FAILED) {
      release(waiting_);
      at = map(size);
    }
    if (at == MAP_FAILED) return nullptr;
    taken_ += size;
    return static_cast<char*>(at);
  }

  static void* map(size_t size) {
    return mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  }

  void release(size_t bytes) {
    while (bytes && waiting_) {
      auto [size, at] = *by_size_.begin();
      size_t part = std::min(size, bytes);
      drop(at, size);
      if (part < size) keep(at, size - part);
      munmap(at + size - part, part);
      bytes -= part;
    }
  }

  void keep(char* at, size_t size) {
    auto after = by_place_.lower_bound(at);
    if (after != by_place_.end() && at + size == after->first) {
      size += after->second;
      auto joined = after++;
      drop(joined->first, joined->second);
    }
    if (after != by_place_.begin()) {
      auto [before, have] = *std::prev(after);
      if (before + have == at) {
        drop(before, have);
        at = before;
        size += have;
      }
    }
    by_place_.emplace(at, size);
    by_size_.insert({size, at});
    waiting_ += size;
  }

  void drop(char* at, size_t size) {
    by_place_.erase(at);
    by_size_.erase({size, at});
    waiting_ -= size;
  }

  std::unordered_map<char*, size_t> used_;
  std::map<char*, size_t> by_place_;  // what waits; neighbours are one block
  std::set<std::pair<size_t, char*>> by_size_;
  size_t live_ = 0, waiting_ = 0, peak_ = 0, taken_ = 0;
};

// Never destroyed: tensors may outlive everything else.
Pages& pages() {
  static Pages* all = new Pages;
  return *all;
}

void give_back(void* at) {
  if (!at) return;
  c10::profiledCPUMemoryReporter().Delete(at);
  if (reinterpret_cast<uintptr_t>(at) % kPage == 0) {
    std::lock_guard<std::mutex> alone(pages().mutex);
    if (pages().give(static_cast<char*>(at))) return;
  }
  std::free(at);
}

void* taken(size_t size) {
  if (size >= kLarge && size <= SIZE_MAX - kPage) {
    std::lock_guard<std::mutex> alone(pages().mutex);
    return pages().take((size + kPage - 1) / kPage * kPage);
  }
  void* at = nullptr;
  return posix_memalign(&at, kAlignment, size) ? nullptr : at;
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    void* at = size ? taken(size) : nullptr;
    if (size && !at) c10::profiledCPUMemoryReporter().OutOfMemory(size);
    TORCH_CHECK(at || !size, "DefaultCPUAllocator: can't allocate memory: you tried to allocate ", size, " bytes.");
    c10::profiledCPUMemoryReporter().New(at, size);
    return {at, at, &give_back, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }
  void copy_data(void* to, const void* from, size_t size) const override { default_copy_data(to, from, size); }
};

}  // namespace

extern "C" void trainwright_heap_use() {
  // A process that forks while another thread allocates would leave the lock closed in its child.
  pthread_atfork([] { pages().mutex.lock(); }, [] { pages().mutex.unlock(); }, [] { pages().mutex.unlock(); });
  c10::SetCPUAllocator(new Allocator, 1);
}

// Bytes in use, waiting, most that were in use at once, and taken from the system so far.
extern "C" void trainwright_heap_count(uint64_t* out) {
  std::lock_guard<std::mutex> alone(pages().mutex);
  pages().count(out);
}
