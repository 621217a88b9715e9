// Which instructions this processor and its system run.

#pragma once

namespace octavo {

// Each has all that those before it have.
enum class Instructions { kPortable, kAvx2, kAvx512, kAmx };

// The most that there is; asks the system for AMX's registers the first time.
Instructions MostInstructions();

}  // namespace octavo
