/* Makes a system call that the table does not know and that writes to memory, and checks what it wrote.
 *
 * Nothing of it is in the log: only a checkpoint after the call can stand for it.
 */
#include "guest.h"
#include <sys/uio.h>

#define WORDS 512

static uint64_t from[WORDS], to[WORDS];

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
        say("round %lu\n", ++rounds);
    }
    say("ok %lu\n", rounds);
    return 0;
}
