// Label map of bilinearly upsampled logits: reads the low-resolution logits once, writes one byte a pixel.
//
// Compiled once per instruction set into the namespace ISA; see confusion_matrix.cpp.

#include "upsample_argmax.h"

#include "label_rows.h"

namespace {

template <class T>
bool run(const UpsampleArgmaxArgs& args, int threads) {
    using Rows = LabelRows<T, uint8_t>;
    const int teams = useful_teams(args, threads);
    const int64_t floats = Rows::floats(args);
    Taps* taps = static_cast<Taps*>(std::malloc(sizeof(Taps) * static_cast<size_t>(Rows::groups(args))));
    float* workspace = static_cast<float*>(std::calloc(static_cast<size_t>(floats * teams), sizeof(float)));
    if (taps != nullptr && workspace != nullptr) {
        const bool near = column_taps(args, taps);
        const int64_t rows = args.logits.batch * args.height;
#pragma omp parallel for num_threads(teams) schedule(static) if (teams > 1)
        for (int team = 0; team < teams; ++team) {
            Rows labels(args, taps, near, workspace + floats * team);
            for (int64_t row = rows * team / teams; row < rows * (team + 1) / teams; ++row)
                labels.row(row / args.height, row % args.height, args.labels + row * args.width);
        }
    }
    const bool done = taps != nullptr && workspace != nullptr;
    std::free(workspace);
    std::free(taps);
    return done;
}

}  // namespace

namespace ISA {

bool upsample_argmax(const UpsampleArgmaxArgs& args, int threads) {
    return args.logits.type == DType::bf16 ? run<bf16>(args, threads) : run<float>(args, threads);
}

}  // namespace ISA
