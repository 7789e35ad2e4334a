/* usage: kinds PORT
 *
 * Holds one descriptor of every kind, waits for a connection, then for a file named `check`, and looks whether each
 * is what it was; prints what it sees. The connection must have been reset.
 */
#include "guest.h"
#include <dirent.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/timerfd.h>
#include <sys/un.h>
#include <sys/wait.h>

static void seen(const char *what) { say("seen %s\n", what); }

static int readable(int fd) {
    struct pollfd polled = {.fd = fd, .events = POLLIN};
    return poll(&polled, 1, 0) == 1 ? polled.revents : 0;
}

static void expect(int fd, const char *want, const char *what) {
    char got[64];
    ssize_t n = read(fd, got, sizeof got);
    if (n != (ssize_t)strlen(want) || memcmp(got, want, (size_t)n) != 0)
        fail("%s: %zd bytes `%.*s` instead of `%s`", what, n, n > 0 ? (int)n : 0, got, want);
}

static int file_with(const char *name, int flags, const char *text) {
    int fd = open(name, flags | O_CREAT | O_CLOEXEC, 0600);
    CHECK(fd >= 0);
    CHECK(write(fd, text, strlen(text)) == (ssize_t)strlen(text));
    return fd;
}

static int locked_by_us(const char *name, int whole) {
    /* Asked by a child: its own locks would not stand in the way of the program itself. */
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        int fd = open(name, O_RDWR);
        struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 3, .l_len = 2};
        int r = whole ? flock(fd, LOCK_EX | LOCK_NB) : fcntl(fd, F_SETLK, &lock);
        _exit(r != 0);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child);
    return WIFEXITED(status) && WEXITSTATUS(status) == 1;
}

int main(int argc, char **argv) {
    /* Not any that is free: it would be given to somebody else while nobody runs. */
    in_port_t port = htons((uint16_t)(argc > 1 ? atoi(argv[1]) : 0));
    char text[256];
    CHECK(mkdir("inner", 0700) == 0);
    CHECK(mkdir("inner/list", 0700) == 0);
    for (int i = 0; i < 5; i++) {
        snprintf(text, sizeof text, "inner/list/%d", i);
        CHECK(close(file_with(text, O_WRONLY, "x")) == 0);
    }
    umask(027);
    CHECK(chdir("inner") == 0);

    int plain = file_with("plain", O_RDWR | O_TRUNC, "0123456789");
    CHECK(lseek(plain, 4, SEEK_SET) == 4);
    int twin = dup(plain), twice = fcntl(plain, F_DUPFD_CLOEXEC, 70);
    CHECK(twin >= 0 && twice >= 70);
    int appended = file_with("appended", O_WRONLY | O_APPEND, "begin ");
    CHECK(write(appended, "middle ", 7) == 7);
    int moved = file_with("before", O_RDWR, "moved");
    CHECK(rename("before", "after") == 0);
    int gone = file_with("gone", O_RDWR | O_EXCL, "kept without a name");
    CHECK(unlink("gone") == 0 && lseek(gone, 5, SEEK_SET) == 5);
    int memory = memfd_create("memory", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    CHECK(memory >= 0 && pwrite(memory, "in memory", 9, 0) == 9);
    CHECK(fcntl(memory, F_ADD_SEALS, F_SEAL_SHRINK) == 0);
    int locked = file_with("locked", O_RDWR, "lock me"), flocked = file_with("flocked", O_RDWR, "me, too");
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 2, .l_len = 4};
    CHECK(fcntl(locked, F_SETLK, &lock) == 0);
    CHECK(flock(flocked, LOCK_EX) == 0);
    DIR *list = opendir("list");
    CHECK(list != NULL);
    int null = open("/dev/null", O_RDWR);

    int pipes[2], closed[2];
    CHECK(pipe2(pipes, O_NONBLOCK) == 0);
    CHECK(write(pipes[1], "drop in a pipe", 14) == 14);
    expect(pipes[0], "drop in a pipe", "pipe");
    CHECK(write(pipes[1], "in a pipe", 9) == 9);
    CHECK(fcntl(pipes[1], F_SETPIPE_SZ, 16384) == 16384);
    CHECK(pipe(closed) == 0 && write(closed[1], "last words", 10) == 10 && close(closed[1]) == 0);
    int stream[2], messages[2], half[2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, stream) == 0);
    CHECK(send(stream[0], "xxto and fro", 12, 0) == 12);
    CHECK(recv(stream[1], text, 2, 0) == 2 && recv(stream[1], text, 2, MSG_PEEK) == 2);
    CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, messages) == 0);
    CHECK(send(messages[0], "one", 3, 0) == 3 && send(messages[0], "two!", 4, 0) == 4);
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, half) == 0);
    CHECK(write(half[1], "the end", 7) == 7 && close(half[1]) == 0);

    uint64_t count = 5;
    int counter = eventfd(2, EFD_NONBLOCK), semaphore = eventfd(3, EFD_SEMAPHORE | EFD_CLOEXEC);
    CHECK(write(counter, &count, 8) == 8);
    CHECK(read(semaphore, &count, 8) == 8 && count == 1);
    int timer = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK), unset = timerfd_create(CLOCK_REALTIME, 0);
    struct itimerspec often = {.it_interval.tv_nsec = 20000000, .it_value.tv_nsec = 10000000}, now;
    CHECK(timerfd_settime(timer, 0, &often, NULL) == 0);
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    CHECK(sigprocmask(SIG_BLOCK, &set, NULL) == 0);
    int signals = signalfd(-1, &set, SFD_NONBLOCK);
    CHECK(counter >= 0 && semaphore >= 0 && timer >= 0 && unset >= 0 && signals >= 0);

    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), one = 1, size = 8192;
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = port, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)}, name;
    socklen_t length = sizeof address;
    CHECK(setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one) == 0);
    CHECK(setsockopt(listener, SOL_SOCKET, SO_RCVBUF, &size, sizeof size) == 0);
    CHECK(bind(listener, (struct sockaddr *)&address, sizeof address) == 0 && listen(listener, 7) == 0);
    CHECK(getsockname(listener, (struct sockaddr *)&address, &length) == 0);
    int bound = socket(AF_INET, SOCK_DGRAM, 0), fresh = socket(AF_INET6, SOCK_STREAM, 0);
    struct sockaddr_in place = {.sin_family = AF_INET, .sin_port = port, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    CHECK(bind(bound, (struct sockaddr *)&place, sizeof place) == 0);
    length = sizeof place;
    CHECK(getsockname(bound, (struct sockaddr *)&place, &length) == 0);
    int to_it = socket(AF_INET, SOCK_DGRAM, 0);
    CHECK(connect(to_it, (struct sockaddr *)&place, sizeof place) == 0);
    int unix_listener = socket(AF_UNIX, SOCK_STREAM, 0);
    struct sockaddr_un path = {.sun_family = AF_UNIX, .sun_path = "socket"};
    CHECK(bind(unix_listener, (struct sockaddr *)&path, sizeof path) == 0 && listen(unix_listener, 3) == 0);

    int inner = epoll_create1(0), outer = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = 0x1234567890abcdef}, got[4];
    CHECK(epoll_ctl(inner, EPOLL_CTL_ADD, counter, &event) == 0);
    event.events = EPOLLIN | EPOLLET;
    event.data.u64 = 2;
    CHECK(epoll_ctl(inner, EPOLL_CTL_ADD, listener, &event) == 0);
    event.events = EPOLLIN;
    event.data.u64 = 3;
    CHECK(epoll_ctl(inner, EPOLL_CTL_ADD, bound, &event) == 0 && epoll_ctl(inner, EPOLL_CTL_DEL, bound, NULL) == 0);
    CHECK(epoll_ctl(outer, EPOLL_CTL_ADD, inner, &event) == 0);
    event.data.u64 = 4;
    CHECK(epoll_ctl(outer, EPOLL_CTL_MOD, inner, &event) == 0);
    CHECK(close(open("/dev/null", O_RDONLY)) == 0);

    say("ready %d\n", ntohs(address.sin_port));
    struct pollfd arrival = {.fd = listener, .events = POLLIN};
    CHECK(poll(&arrival, 1, 30000) == 1);
    int connection = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
    CHECK(connection >= 0 && recv(connection, text, 5, 0) == 5);
    event.events = EPOLLIN;
    event.data.u64 = 5;
    CHECK(epoll_ctl(outer, EPOLL_CTL_ADD, connection, &event) == 0);
    say("holds them all\n");
    struct timespec moment = {.tv_nsec = 2000000};
    while (access("../check", F_OK) != 0) nanosleep(&moment, NULL);

    CHECK(getcwd(text, sizeof text) && strcmp(text + strlen(text) - 6, "/inner") == 0);
    CHECK(umask(027) == 027);
    seen("directory and umask");
    expect(plain, "456789", "plain");
    CHECK(lseek(twin, 0, SEEK_CUR) == 10 && lseek(twice, 2, SEEK_SET) == 2 && lseek(plain, 0, SEEK_CUR) == 2);
    CHECK(fcntl(twice, F_GETFD) == FD_CLOEXEC && fcntl(twin, F_GETFD) == 0 && fcntl(plain, F_GETFD) == FD_CLOEXEC);
    seen("a file, its position, its twins");
    CHECK(fcntl(appended, F_GETFL) & O_APPEND);
    CHECK(lseek(appended, 0, SEEK_CUR) == 13 && write(appended, "end", 3) == 3);
    struct stat info;
    CHECK(fstat(appended, &info) == 0 && info.st_size == 16);
    seen("a file that is appended to");
    struct stat named;
    CHECK(fstat(moved, &info) == 0 && stat("after", &named) == 0 && info.st_ino == named.st_ino);
    seen("a file that was renamed");
    expect(gone, "without a name", "gone");
    CHECK(fstat(gone, &info) == 0 && info.st_size == 19 && access("gone", F_OK) != 0);
    CHECK(pread(memory, text, sizeof text, 0) == 9 && memcmp(text, "in memory", 9) == 0);
    CHECK(fcntl(memory, F_GET_SEALS) == F_SEAL_SHRINK && ftruncate(memory, 1) != 0);
    seen("files without names");
    int entries = 0;
    while (readdir(list)) entries++;
    if (entries != 7) fail("%d entries in the directory", entries);
    CHECK(write(null, "x", 1) == 1);
    seen("a directory, a device");

    CHECK(fcntl(pipes[0], F_GETPIPE_SZ) == 16384 && fcntl(pipes[0], F_GETFL) & O_NONBLOCK);
    expect(pipes[0], "in a pipe", "pipe");
    CHECK(read(pipes[0], text, 1) == -1 && errno == EAGAIN);
    CHECK(write(pipes[1], "on", 2) == 2);
    expect(pipes[0], "on", "pipe");
    expect(closed[0], "last words", "closed pipe");
    CHECK(read(closed[0], text, 1) == 0);
    seen("pipes");
    expect(stream[1], "to and fro", "stream");
    CHECK(write(stream[1], "and back", 8) == 8);
    expect(stream[0], "and back", "stream");
    expect(messages[1], "one", "messages");
    expect(messages[1], "two!", "messages");
    CHECK(recv(messages[1], text, 1, MSG_DONTWAIT) == -1 && errno == EAGAIN);
    expect(half[0], "the end", "half a pair");
    CHECK(read(half[0], text, 1) == 0);
    seen("pairs of sockets");

    CHECK(epoll_wait(outer, got, 4, 0) == 2);
    CHECK(got[0].data.u64 + got[1].data.u64 == 9);
    CHECK(epoll_wait(inner, got, 4, 0) == 1 && got[0].data.u64 == 0x1234567890abcdef);
    CHECK(read(counter, &count, 8) == 8 && count == 7);
    CHECK(read(semaphore, &count, 8) == 8 && count == 1 && read(semaphore, &count, 8) == 8 && !readable(semaphore));
    CHECK(epoll_wait(inner, got, 4, 0) == 0);
    seen("epoll sets, eventfds");
    struct pollfd ticks = {.fd = timer, .events = POLLIN};
    CHECK(poll(&ticks, 1, 1000) == 1 && read(timer, &count, 8) == 8 && count >= 1);
    CHECK(timerfd_gettime(timer, &now) == 0 && now.it_interval.tv_nsec == 20000000 && now.it_value.tv_nsec > 0);
    CHECK(timerfd_gettime(unset, &now) == 0 && now.it_value.tv_sec == 0 && now.it_value.tv_nsec == 0);
    seen("timerfds");
    CHECK(kill(getpid(), SIGUSR1) == 0);
    struct signalfd_siginfo signal_info;
    CHECK(read(signals, &signal_info, sizeof signal_info) == sizeof signal_info && signal_info.ssi_signo == SIGUSR1);
    seen("a signalfd");

    length = sizeof name;
    CHECK(getsockname(listener, (struct sockaddr *)&name, &length) == 0 && name.sin_port == address.sin_port);
    struct tcp_info tcp;
    length = sizeof tcp;
    CHECK(getsockopt(listener, IPPROTO_TCP, TCP_INFO, &tcp, &length) == 0 && tcp.tcpi_sacked == 7);
    length = sizeof one;
    CHECK(getsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, &length) == 0 && one == 1);
    CHECK(getsockopt(listener, SOL_SOCKET, SO_RCVBUF, &size, &length) == 0 && size == 16384);
    CHECK(accept(listener, NULL, NULL) == -1 && errno == EAGAIN);
    int client = socket(AF_INET, SOCK_STREAM, 0);
    CHECK(connect(client, (struct sockaddr *)&address, sizeof address) == 0);
    CHECK(poll(&arrival, 1, 1000) == 1 && accept(listener, NULL, NULL) >= 0);
    seen("a listening socket");
    CHECK(send(to_it, "datagram", 8, 0) == 8);
    expect(bound, "datagram", "datagram socket");
    CHECK(bind(fresh, (struct sockaddr *)&(struct sockaddr_in6){.sin6_family = AF_INET6}, sizeof(struct sockaddr_in6)) == 0 ||
          errno == EADDRNOTAVAIL);
    seen("datagram sockets, a fresh socket");
    client = socket(AF_UNIX, SOCK_STREAM, 0);
    CHECK(connect(client, (struct sockaddr *)&path, sizeof path) == 0 && accept(unix_listener, NULL, NULL) >= 0);
    seen("a Unix socket that listens");
    CHECK(recv(connection, text, 1, 0) == -1 && errno == ECONNRESET);
    CHECK(send(connection, text, 1, MSG_NOSIGNAL) == -1 && errno == EPIPE);
    seen("a connection that was reset");
    CHECK(locked_by_us("locked", 0) && locked_by_us("flocked", 1));
    seen("locks");
    int lowest = open("/dev/null", O_RDONLY);
    CHECK(lowest == client + 1 || lowest == client + 2);
    say("all is there\n");
    return 0;
}
