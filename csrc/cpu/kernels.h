// How a CPU kernel is declared once for every instruction set that it is compiled for, and how one is picked.
//
// csrc/cpu/<op>.h declares:  DECLARE_CPU_KERNEL(confusion_matrix, bool(const ConfusionArgs& args, int
// threads)) csrc/cpu/<op>.cpp defines: namespace ISA { bool confusion_matrix(...) {...} } csrc/bind/<op>.cpp
// calls:  CPU_KERNEL(confusion_matrix)(args, threads)
#pragma once

enum class InstructionSet { portable, avx2, avx512 };

// The one in use: the best of this processor, or what a test asked for. Defined in module.cpp.
InstructionSet instruction_set();

#define DECLARE_CPU_KERNEL(name, ...)   \
    namespace cpu_kernel_types {        \
    using name = __VA_ARGS__;           \
    }                                   \
    namespace portable {                \
    extern cpu_kernel_types::name name; \
    }                                   \
    namespace avx2 {                    \
    extern cpu_kernel_types::name name; \
    }                                   \
    namespace avx512 {                  \
    extern cpu_kernel_types::name name; \
    }

template <class Kernel>
Kernel* pick_cpu_kernel(Kernel* for_portable, Kernel* for_avx2, Kernel* for_avx512) {
    switch (instruction_set()) {
        case InstructionSet::avx512:
            return for_avx512;
        case InstructionSet::avx2:
            return for_avx2;
        case InstructionSet::portable:
            break;
    }
    return for_portable;
}

#ifdef WITH_X86_KERNELS
#define CPU_KERNEL(name) (*pick_cpu_kernel(portable::name, avx2::name, avx512::name))
#else
#define CPU_KERNEL(name) (*portable::name)
#endif
