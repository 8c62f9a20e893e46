// The part of NVRTC that awqc and burn-cuda call, on a CPU: the system's C++ compiler makes a shared library of a kernel's text, which
// the imitation of the driver loads as if it were machine code of a GPU. `device.h` and `libcuda.so.1` lie beside this
// library.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <dlfcn.h>
#include <fstream>
#include <sstream>
#include <string>
#include <unistd.h>

struct Program {
    std::string text, name, binary, log;
};

static std::string read_file(const std::string &path) {
    std::ifstream file(path, std::ios::binary);
    std::stringstream bytes;
    bytes << file.rdbuf();
    return bytes.str();
}

static std::string folder() {
    Dl_info info{};
    dladdr(reinterpret_cast<void *>(read_file), &info);
    std::string path = info.dli_fname ? info.dli_fname : "";
    return path.substr(0, path.rfind('/'));
}

// The name of the kernel: what stands between its attributes and its parameters.
static std::string entry(const std::string &text) {
    size_t at = text.find("extern \"C\" __global__");
    at = at == std::string::npos ? at : text.find("__launch_bounds__(", at);
    at = at == std::string::npos ? at : text.find(')', at);
    at = at == std::string::npos ? at : text.find_first_not_of(" \n)", at);
    return at == std::string::npos ? "" : text.substr(at, text.find_first_of(" \n(", at) - at);
}

static int compile(Program &program) {
    const char *folder_of_all = std::getenv("TMPDIR");
    std::string base = std::string(folder_of_all && *folder_of_all ? folder_of_all : "/tmp") + "/emulated-nvrtc-XXXXXX";
    if (!mkdtemp(base.data())) return 1;
    const std::string source = base + "/kernel.cpp", library = base + "/kernel.so", log = base + "/log";
    const std::string kernel = entry(program.text);
    {
        std::ofstream out(source);
        out << "#include \"device.h\"\n";
        std::istringstream lines(program.text);
        for (std::string line; std::getline(lines, line);)
            if (line.rfind("#include", 0) != 0) out << line << '\n';
        out << "extern \"C\" const Kernel emulated_kernel = KERNEL(" << kernel << ");\n";
    }
    // Kernels of burn share names: each library has to keep to its own.
    const std::string command = "g++ -std=c++20 -O1 -ffp-contract=off -fno-strict-aliasing -fno-gnu-unique -w -shared -fPIC "
                                "-Wl,-Bsymbolic -I '" + folder() + "' '" + source + "' '" + folder() + "/libcuda.so.1' -o '" + library + "' 2> '" + log + "'";
    const int status = std::system(command.c_str());
    program.binary = read_file(library);
    program.log = status ? read_file(log) : "ptxas info    : Used 32 registers\n";
    for (const std::string &file : {source, library, log}) unlink(file.c_str());
    rmdir(base.c_str());
    return status ? 6 : 0;
}

static int size_of(const std::string &text, size_t *size) { return *size = text.size() + 1, 0; }
static int copy_of(const std::string &text, char *out) { return std::copy_n(text.c_str(), text.size() + 1, out), 0; }

extern "C" {
int nvrtcVersion(int *major, int *minor) { return *major = 12, *minor = 0, 0; }
int nvrtcCreateProgram(void **program, const char *text, const char *name, int, const char **, const char **) {
    return *program = new Program{text, name ? name : "", "", ""}, 0;
}
int nvrtcDestroyProgram(void **program) { return delete static_cast<Program *>(*program), 0; }
int nvrtcCompileProgram(void *program, int, const char **) { return compile(*static_cast<Program *>(program)); }
int nvrtcGetProgramLogSize(void *program, size_t *size) { return size_of(static_cast<Program *>(program)->log, size); }
int nvrtcGetProgramLog(void *program, char *out) { return copy_of(static_cast<Program *>(program)->log, out); }
// burn-cuda, which names no program, loads what it gets here; awqc loads machine code, and keeps this as a file.
static std::string ptx(void *program) {
    const auto *p = static_cast<Program *>(program);
    return p->name.empty() ? p->binary : "// none";
}
int nvrtcGetPTXSize(void *program, size_t *size) { return size_of(ptx(program), size); }
int nvrtcGetPTX(void *program, char *out) { return copy_of(ptx(program), out); }
const char *nvrtcGetErrorString(int) { return "the imitation of NVRTC refuses"; }
int nvrtcGetCUBINSize(void *program, size_t *size) { return size_of(static_cast<Program *>(program)->binary, size); }
int nvrtcGetCUBIN(void *program, char *out) { return copy_of(static_cast<Program *>(program)->binary, out); }
}
