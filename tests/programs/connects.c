/* Connects in blocking mode, over TCP and Unix sockets, again and again.
 *
 * usage: connects [PORT]
 * Such a call returns when there is a connection, and leaves the socket in blocking mode. */
#include "guest.h"
#include <sys/un.h>

/* One connection; a byte goes from end to end. */
static void connect_once(int listener, int family, const struct sockaddr *address, socklen_t length) {
    int near = socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    CHECK(near >= 0);
    CHECK(connect(near, address, length) == 0);
    CHECK((fcntl(near, F_GETFL) & O_NONBLOCK) == 0);
    int far = accept(listener, NULL, NULL);
    CHECK(far >= 0);
    char byte = 'x';
    write_all(far, &byte, 1);
    byte = 0;
    CHECK(read(near, &byte, 1) == 1 && byte == 'x');
    close(near);
    close(far);
}

int main(int argc, char **argv) {
    struct sockaddr_un name = {.sun_family = AF_UNIX, .sun_path = "connects.sock"};
    int named = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    CHECK(named >= 0 && bind(named, (struct sockaddr *)&name, sizeof name) == 0 && listen(named, 8) == 0);
    int listener = listen_tcp(argc > 1 ? atoi(argv[1]) : 0);
    struct sockaddr_in address;
    socklen_t length = sizeof address;
    CHECK(getsockname(listener, (struct sockaddr *)&address, &length) == 0);
    unsigned long rounds = 0;
    while (!stop_requested()) {
        connect_once(listener, AF_INET, (struct sockaddr *)&address, length);
        connect_once(named, AF_UNIX, (struct sockaddr *)&name, sizeof name);
        say("round %lu\n", ++rounds);
    }
    say("ok %lu\n", rounds);
    return 0;
}
