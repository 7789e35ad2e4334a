/* Hands a listening socket to a program as a service manager does (sd_listen_fds(3)), and becomes it.
 *
 * usage: activate PROGRAM [ARGUMENT]...
 */
#include "guest.h"

int main(int argc, char **argv) {
    CHECK(argc > 1);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    CHECK(bind(fd, (struct sockaddr *)&address, sizeof address) == 0);
    CHECK(listen(fd, 128) == 0);
    if (fd == 3) {
        CHECK(fcntl(fd, F_SETFD, 0) == 0);
    } else {
        CHECK(dup2(fd, 3) == 3);
    }
    char pid[16];
    snprintf(pid, sizeof pid, "%d", (int)getpid());
    CHECK(setenv("LISTEN_PID", pid, 1) == 0);
    CHECK(setenv("LISTEN_FDS", "1", 1) == 0);
    CHECK(setenv("LISTEN_FDNAMES", "echo", 1) == 0);
    execv(argv[1], argv + 1);
    fail("%s", argv[1]);
}
