// The part of the CUDA driver that awqc calls, on a CPU. Kernels are linked in (`kernels.cpp`), and modules then empty,
// or come from the imitation of NVRTC as shared libraries.
// New memory is filled with NaN.
#include <dlfcn.h>
#include <elf.h>
#include <functional>
#include <map>
#include <string>
#include <unistd.h>
#include <utility>
#include <vector>

#include "kernels.cpp"
#undef asm
#undef volatile

extern "C" {
alignas(128) unsigned char dynamic_shared_mem[256 << 10];
}

namespace emu {
Fiber *current = nullptr;
uint3 block, grid, threads;

static std::vector<Fiber> fibers;
static std::vector<Warp> warps;
static Warp whole; // the block, as one group
static void *scheduler = nullptr;
static std::vector<unsigned char *> stacks;
static constexpr size_t STACK = 128 << 10;
static long progress = 0;
static void (*entry)(void **) = nullptr;
static void **entry_args = nullptr;

#if defined(__x86_64__)
extern "C" void emu_switch(void **save, void *to);
__asm__(".text\n.globl emu_switch\n.hidden emu_switch\nemu_switch:\n"
        "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
        "movq %rsp, (%rdi)\nmovq %rsi, %rsp\n"
        "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n");
static void run_fiber();
static void *prepare(unsigned char *stack) {
    void **top = reinterpret_cast<void **>(reinterpret_cast<uintptr_t>(stack + STACK) & ~uintptr_t(15));
    *--top = nullptr; // where a call would have put its return address
    *--top = reinterpret_cast<void *>(run_fiber);
    for (int i = 0; i < 6; i++) *--top = nullptr;
    return top;
}
#elif defined(__aarch64__)
extern "C" void emu_switch(void **save, void *to);
__asm__(".text\n.globl emu_switch\n.hidden emu_switch\nemu_switch:\n"
        "sub sp, sp, #160\n"
        "stp x19, x20, [sp]\nstp x21, x22, [sp, #16]\nstp x23, x24, [sp, #32]\nstp x25, x26, [sp, #48]\n"
        "stp x27, x28, [sp, #64]\nstp x29, x30, [sp, #80]\n"
        "stp d8, d9, [sp, #96]\nstp d10, d11, [sp, #112]\nstp d12, d13, [sp, #128]\nstp d14, d15, [sp, #144]\n"
        "mov x9, sp\nstr x9, [x0]\nmov sp, x1\n"
        "ldp x19, x20, [sp]\nldp x21, x22, [sp, #16]\nldp x23, x24, [sp, #32]\nldp x25, x26, [sp, #48]\n"
        "ldp x27, x28, [sp, #64]\nldp x29, x30, [sp, #80]\n"
        "ldp d8, d9, [sp, #96]\nldp d10, d11, [sp, #112]\nldp d12, d13, [sp, #128]\nldp d14, d15, [sp, #144]\n"
        "add sp, sp, #160\nret\n");
static void run_fiber();
static void *prepare(unsigned char *stack) {
    uintptr_t top = (reinterpret_cast<uintptr_t>(stack + STACK) & ~uintptr_t(15)) - 160;
    std::memset(reinterpret_cast<void *>(top), 0, 160);
    reinterpret_cast<void **>(top)[11] = reinterpret_cast<void *>(run_fiber); // x30
    return reinterpret_cast<void *>(top);
}
#else
#error "the emulator switches fibers on x86-64 and 64-bit ARM"
#endif

static void yield() { emu_switch(&current->stack_pointer, scheduler); }

static void leave(Warp &group) {
    group.alive--;
    if (group.alive > 0 && group.arrived == group.alive) group.arrived = 0, group.generation++;
}

static void run_fiber() {
    entry(entry_args);
    current->done = true;
    progress++;
    leave(*current->warp);
    leave(whole);
    yield();
    std::abort();
}

static void arrive(Warp &group) {
    progress++;
    unsigned mine = group.generation;
    if (++group.arrived == group.alive) {
        group.arrived = 0;
        group.generation++;
        return;
    }
    while (group.generation == mine) yield();
}
void sync_block() { arrive(whole); }
void sync_warp() { arrive(*current->warp); }

static void run_block() {
    const unsigned count = threads.x * threads.y * threads.z;
    fibers.assign(count, Fiber{});
    warps.assign((count + 31) / 32, Warp{});
    whole = Warp{};
    whole.alive = int(count);
    while (stacks.size() < count) stacks.push_back(static_cast<unsigned char *>(std::malloc(STACK)));
    for (unsigned i = 0; i < count; i++) {
        fibers[i].thread = {i % threads.x, i / threads.x % threads.y, i / threads.x / threads.y};
        fibers[i].lane = int(i % 32);
        fibers[i].warp = &warps[i / 32];
        warps[i / 32].alive++;
        fibers[i].stack_pointer = prepare(stacks[i]);
    }
    for (unsigned left = count; left > 0;) {
        long before = progress;
        left = 0;
        for (Fiber &fiber : fibers) {
            if (fiber.done) continue;
            current = &fiber;
            emu_switch(&scheduler, fiber.stack_pointer);
            left += !fiber.done;
        }
        if (left > 0 && progress == before) {
            std::fprintf(stderr, "emulator: %u threads wait at a barrier that others never reach\n", left);
            std::abort();
        }
    }
}

// Blocks run one after the other. Nothing may depend on their order.
static void run(const Kernel &kernel, uint3 blocks, uint3 count, unsigned shared, void **args, bool backwards) {
    entry = kernel.call;
    entry_args = args;
    grid = blocks;
    threads = count;
    const size_t all = size_t(blocks.x) * blocks.y * blocks.z;
    for (size_t i = 0; i < all; i++) {
        const size_t at = backwards ? all - 1 - i : i;
        block = {unsigned(at % blocks.x), unsigned(at / blocks.x % blocks.y), unsigned(at / blocks.x / blocks.y)};
        std::memset(dynamic_shared_mem, 0xff, shared);
        run_block();
    }
}
} // namespace emu

// ---- the driver ----
typedef int Status;
typedef uint64_t Pointer;
struct Graph {
    std::vector<std::function<void()>> work;
};
static Graph *capturing = nullptr;
static std::map<std::string, long> launches;
static void submit(std::function<void()> work) {
    if (capturing)
        capturing->work.push_back(std::move(work));
    else
        work();
}

extern "C" {
// Failures that a test asks for: devices, capability, bytes of memory.
static int setting(const char *name, int otherwise) {
    const char *text = std::getenv(name);
    return text ? std::atoi(text) : otherwise;
}
static size_t used = 0;
static std::map<Pointer, size_t> blocks;
static size_t capacity() {
    const char *megabytes = std::getenv("EMULATOR_MEGABYTES");
    return size_t((megabytes ? std::atof(megabytes) : 4096) * (1 << 20));
}

Status cuInit(unsigned) { return setting("EMULATOR_DEVICES", 1) ? 0 : 100; }
// NVIDIA's compiler asks the driver for tables of its own, and works without them.
Status cuGetExportTable(const void **table, const void *) { return *table = nullptr, 500; }
Status cuDeviceGetCount(int *count) { return *count = setting("EMULATOR_DEVICES", 1), 0; }
Status cuDeviceGet(int *device, int) { return *device = 0, 0; }
Status cuDeviceGetName(char *name, int size, int) { return std::snprintf(name, size, "a CPU that plays a GPU"), 0; }
Status cuDeviceGetAttribute(int *value, int which, int) {
    int sm = setting("EMULATOR_SM", 89);
    switch (which) {
    case 75: *value = sm / 10; break; // the capability
    case 76: *value = sm % 10; break;
    case 1: case 2: case 3: *value = 1024; break; // threads of a block: in all, and of two axes
    case 4: *value = 64; break;
    case 5: *value = 0x7fffffff; break; // blocks of a grid
    case 6: case 7: *value = 65535; break;
    case 10: *value = 32; break; // threads of a warp
    case 8: case 97: *value = 99 << 10; break; // shared memory of a block
    default: *value = 4; // multiprocessors
    }
    return 0;
}
Status cuDeviceTotalMem_v2(size_t *bytes, int) { return *bytes = capacity(), 0; }
Status cuDevicePrimaryCtxRetain(void **context, int) { return *context = &used, 0; }
Status cuDevicePrimaryCtxRelease_v2(int) { return 0; }
Status cuCtxSetCurrent(void *) { return 0; }
Status cuMemGetInfo_v2(size_t *free, size_t *total) { return *total = capacity(), *free = capacity() - used, 0; }
Status cuMemAlloc_v2(Pointer *out, size_t bytes) {
    if (used + bytes > capacity()) return 2;
    void *memory = std::aligned_alloc(512, (bytes + 511) / 512 * 512);
    std::memset(memory, 0xff, bytes);
    *out = reinterpret_cast<Pointer>(memory);
    blocks[*out] = bytes;
    used += bytes;
    return 0;
}
Status cuMemFree_v2(Pointer at) {
    auto found = blocks.find(at);
    if (found == blocks.end()) return 1;
    used -= found->second;
    blocks.erase(found);
    std::free(reinterpret_cast<void *>(at));
    return 0;
}
// Streams do what they are told at once.
Status cuMemAllocAsync(Pointer *out, size_t bytes, void *) { return cuMemAlloc_v2(out, bytes); }
Status cuMemFreeAsync(Pointer at, void *) { return cuMemFree_v2(at); }
Status cuMemAllocHost_v2(void **out, size_t bytes) { return *out = std::malloc(bytes), *out ? 0 : 2; }
Status cuMemFreeHost(void *at) { return std::free(at), 0; }
struct Side {
    size_t x, y;
    int type; // 1 is the host, 2 the device
    void *host;
    Pointer device;
    void *array;
    size_t pitch;
    char *row(size_t i) const {
        char *base = type == 1 ? static_cast<char *>(host) : reinterpret_cast<char *>(device);
        return base + (y + i) * pitch + x;
    }
};
struct Copy {
    Side from, to;
    size_t bytes, rows;
};
Status cuMemcpy2DAsync_v2(const Copy *copy, void *) {
    for (size_t i = 0; i < copy->rows; i++) std::memcpy(copy->to.row(i), copy->from.row(i), copy->bytes);
    return 0;
}
Status cuMemcpyHtoDAsync_v2(Pointer to, const void *from, size_t bytes, void *) {
    return std::memcpy(reinterpret_cast<void *>(to), from, bytes), 0;
}
Status cuMemcpyDtoHAsync_v2(void *to, Pointer from, size_t bytes, void *) {
    return std::memcpy(to, reinterpret_cast<void *>(from), bytes), 0;
}
Status cuMemcpyDtoDAsync_v2(Pointer to, Pointer from, size_t bytes, void *) {
    submit([=] { std::memcpy(reinterpret_cast<void *>(to), reinterpret_cast<void *>(from), bytes); });
    return 0;
}
// A shared library, in the place of machine code; null if the kernels are linked in.
static void *load(const void *image) {
    if (std::strncmp(static_cast<const char *>(image), ELFMAG, SELFMAG) != 0) return nullptr;
    const auto *header = static_cast<const Elf64_Ehdr *>(image);
    // The section headers are the last part of the file.
    const size_t bytes = header->e_shoff + size_t(header->e_shnum) * header->e_shentsize;
    const char *folder = std::getenv("TMPDIR");
    std::string path = std::string(folder && *folder ? folder : "/tmp") + "/emulated-module-XXXXXX";
    const int file = mkstemp(path.data());
    const bool written = file >= 0 && write(file, image, bytes) == ssize_t(bytes);
    close(file);
    void *library = written ? dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL) : nullptr;
    if (!library) std::fprintf(stderr, "emulator: %s\n", dlerror());
    unlink(path.c_str());
    return library;
}
Status cuModuleLoadData(void **module, const void *image) { return *module = load(image), 0; }
Status cuModuleUnload(void *module) { return module ? dlclose(module) : 0; }
Status cuModuleGetFunction(void **function, void *module, const char *name) {
    const auto *one = module ? static_cast<const Kernel *>(dlsym(module, "emulated_kernel")) : nullptr;
    if (one && std::string(one->name) == name) return *function = const_cast<Kernel *>(one), 0;
    for (const Kernel &kernel : KERNELS)
        if (std::string(kernel.name) == name) return *function = const_cast<Kernel *>(&kernel), 0;
    return 500;
}
Status cuFuncSetAttribute(void *, int, int) { return 0; }
Status cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned tx, unsigned ty, unsigned tz,
                      unsigned shared, void *, void **args, void **) {
    const Kernel *kernel = static_cast<const Kernel *>(function);
    if (shared > sizeof dynamic_shared_mem || tx * ty * tz > 1024 || y > 65535 || z > 65535) return 1;
    // Addresses, and what is handed over by value; whole words, so that it is aligned.
    std::vector<std::vector<uint64_t>> values;
    for (int i = 0; i < kernel->arity; i++) {
        values.emplace_back((kernel->sizes[i] + 7) / 8);
        std::memcpy(values.back().data(), args[i], kernel->sizes[i]);
    }
    submit([=]() mutable {
        std::vector<void *> pointers;
        for (auto &value : values) pointers.push_back(value.data());
        const bool backwards = launches[kernel->name]++ % 2;
        emu::run(*kernel, {x, y, z}, {tx, ty, tz}, shared, pointers.data(), backwards);
    });
    return 0;
}
Status cuStreamCreate(void **stream, unsigned) { return *stream = &used, 0; }
Status cuStreamDestroy_v2(void *) { return 0; }
Status cuStreamSynchronize(void *) { return 0; }
Status cuStreamWaitEvent(void *, void *, unsigned) { return 0; }
Status cuStreamBeginCapture_v2(void *, int) {
    if (!setting("EMULATOR_GRAPHS", 1)) return 801;
    return capturing = new Graph, 0;
}
Status cuStreamEndCapture(void *, void **graph) { return *graph = capturing, capturing = nullptr, 0; }
Status cuGraphInstantiateWithFlags(void **exec, void *graph, uint64_t) {
    return *exec = new Graph(*static_cast<Graph *>(graph)), 0;
}
Status cuGraphLaunch(void *exec, void *) {
    for (auto &work : static_cast<Graph *>(exec)->work) work();
    return 0;
}
Status cuGraphDestroy(void *graph) { return delete static_cast<Graph *>(graph), 0; }
Status cuGraphExecDestroy(void *exec) { return delete static_cast<Graph *>(exec), 0; }
Status cuGetErrorName(Status status, const char **text) {
    *text = status == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : status == 500 ? "CUDA_ERROR_NOT_FOUND" : "CUDA_ERROR_UNKNOWN";
    return 0;
}
Status cuGetErrorString(Status status, const char **text) {
    *text = status == 500 ? "named symbol not found" : "the emulator refuses";
    return 0;
}
Status cuEventCreate(void **event, unsigned) { return *event = &used, 0; }
Status cuEventRecord(void *, void *) { return 0; }
Status cuEventSynchronize(void *) { return 0; }
Status cuEventElapsedTime(float *milliseconds, void *, void *) { return *milliseconds = 1, 0; }
Status cuEventDestroy_v2(void *) { return 0; }
}
