/* Line echo server, one thread for each connection.
 *
 * usage: thread_echo [PORT]
 * Same answers as epoll_echo. The total is kept by one counting thread: a connection's thread queues its
 * ticket under a mutex, signals a condition variable, and waits on its own for the number.
 */
#include "guest.h"
#include <pthread.h>

struct ticket {
    struct ticket *next;
    pthread_cond_t drawn;
    unsigned long number;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t asked = PTHREAD_COND_INITIALIZER;
static struct ticket *first, **last = &first;

static void *count(void *unused) {
    (void)unused;
    unsigned long total = 0;
    pthread_mutex_lock(&lock);
    for (;;) {
        while (!first) pthread_cond_wait(&asked, &lock);
        struct ticket *ticket = first;
        first = ticket->next;
        if (!first) last = &first;
        ticket->number = ++total;
        pthread_cond_signal(&ticket->drawn);
    }
    return NULL;
}

static unsigned long draw(void) {
    struct ticket ticket = {.next = NULL, .number = 0};
    pthread_cond_init(&ticket.drawn, NULL);
    pthread_mutex_lock(&lock);
    *last = &ticket;
    last = &ticket.next;
    pthread_cond_signal(&asked);
    while (ticket.number == 0) pthread_cond_wait(&ticket.drawn, &lock);
    pthread_mutex_unlock(&lock);
    pthread_cond_destroy(&ticket.drawn);
    return ticket.number;
}

static void *serve(void *argument) {
    int fd = (int)(intptr_t)argument;
    FILE *in = fdopen(fd, "r");
    CHECK(in != NULL);
    char *line = NULL;
    size_t room = 0;
    ssize_t length;
    unsigned long served = 0;
    while ((length = getline(&line, &room, in)) > 0) {
        if (line[length - 1] == '\n') line[--length] = 0;
        served++;
        answer_line(fd, served, draw(), line, (size_t)length);
    }
    free(line);
    fclose(in);
    return NULL;
}

int main(int argc, char **argv) {
    signal(SIGPIPE, SIG_IGN);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, count, NULL) == 0);
    int listener = listen_tcp(argc > 1 ? atoi(argv[1]) : 0);
    for (;;) {
        int fd = accept(listener, NULL, NULL);
        if (fd < 0 && (errno == EINTR || errno == ECONNABORTED)) continue;
        CHECK(fd >= 0);
        int one = 1;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        CHECK(pthread_create(&thread, NULL, serve, (void *)(intptr_t)fd) == 0);
        pthread_detach(thread);
    }
}
