/* Makes a system call that the table does not know and that writes to memory, and checks what it wrote; names
 * itself through a file of /proc, and checks its name.
 *
 * Nothing of it is in the log: only a checkpoint after the call can stand for it.
 */
#include "guest.h"
#include <sys/prctl.h>
#include <sys/uio.h>

#define WORDS 512

static uint64_t from[WORDS], to[WORDS];

static void take_name(unsigned long round) {
    char name[16], found[16];
    int n = snprintf(name, sizeof name, "round %lu", round);
    int fd = open("/proc/self/comm", O_WRONLY | O_CLOEXEC);
    CHECK(fd >= 0);
    CHECK(write(fd, name, (size_t)n) == n);
    CHECK(close(fd) == 0);
    CHECK(prctl(PR_GET_NAME, found) == 0);
    if (strcmp(name, found) != 0) fail("the name is %s instead of %s", found, name);
}

int main(void) {
    uint64_t value = 1;
    unsigned long rounds = 0;
    say("ready 0\n");
    while (!stop_requested()) {
        for (int i = 0; i < WORDS; i++) from[i] = value = mix(value);
        memset(to, 0, sizeof to);
        struct iovec local = {to, sizeof to}, remote = {from, sizeof from};
        CHECK(process_vm_readv(getpid(), &local, 1, &remote, 1, 0) == (ssize_t)sizeof from);
        CHECK(memcmp(from, to, sizeof to) == 0);
        take_name(++rounds);
        say("round %lu\n", rounds);
    }
    say("ok %lu\n", rounds);
    return 0;
}
