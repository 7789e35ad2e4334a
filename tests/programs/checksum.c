/* Computes only: no system call between `ready` and the result. Writes to 256 KiB of memory as it goes.
 *
 * usage: checksum STEPS; prints `ready 0`, then `STEPS CHECKSUM`.
 */
#include "guest.h"

enum { SLOTS = 32768 };
static uint64_t table[SLOTS];

int main(int argc, char **argv) {
    uint64_t steps = argc > 1 ? strtoull(argv[1], NULL, 10) : 1000000, value = 1;
    say("ready 0\n");
    for (uint64_t i = 0; i < steps; i++) {
        value = mix(value);
        table[value % SLOTS] += value;
    }
    for (int i = 0; i < SLOTS; i++) value = mix(value ^ table[i]);
    say("%llu %llu\n", (unsigned long long)steps, (unsigned long long)value);
    return 0;
}
