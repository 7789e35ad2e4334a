/* Computes, and appends each result to results.txt with one write: line N is `N VALUE`. */
#include "guest.h"

int main(int argc, char **argv) {
    long steps = argc > 1 ? atol(argv[1]) : 200000;
    int out = open("results.txt", O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    CHECK(out >= 0);
    say("ready 0\n");
    uint64_t value = 1;
    long n = 0;
    while (!stop_requested()) {
        for (long i = 0; i < steps; i++) value = mix(value);
        char line[64];
        int length = snprintf(line, sizeof line, "%ld %llu\n", ++n, (unsigned long long)value);
        CHECK(write(out, line, (size_t)length) == length);
        say("round %ld\n", n);
    }
    say("ok %ld\n", n);
    return 0;
}
