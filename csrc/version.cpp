#include "ops.h"

int32_t m2rl_abi_version() { return M2RL_ABI_VERSION; }
