/* A team of threads that shares out numbered items of work.
 *
 * The threads are ours, so that neither OpenMP's number nor its way of waiting matters. Who computes an item is decided while it
 * runs; what an item computes never depends on it.
 */
#ifndef MOEBIUS_THREADS_H
#define MOEBIUS_THREADS_H
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <sched.h>

enum { MOST_THREADS = 256, SPINS = 4000 };

typedef void work(void *context, long item, int worker);

struct team {
    pthread_mutex_t busy;  /* held by the one call that uses the team; other calls run alone */
    pthread_mutex_t sleep; /* guards the two conditions */
    pthread_cond_t wake, done;
    int alive;             /* workers that exist; the caller is worker 0 and not among them */
    atomic_long round;     /* counts the jobs; a change is the signal to start */
    atomic_int working;    /* workers that have not finished the present job */
    int wanted;            /* worker numbers below this take part */
    work *job;
    void *context;
    long items;
    atomic_long next;      /* the first item that nobody has taken */
};

static struct team team = {
    .busy = PTHREAD_MUTEX_INITIALIZER, .sleep = PTHREAD_MUTEX_INITIALIZER,
    .wake = PTHREAD_COND_INITIALIZER, .done = PTHREAD_COND_INITIALIZER,
};

static inline void pause_briefly(int spin) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
    if (spin % 256 == 255) sched_yield(); /* where threads outnumber cores, spinning keeps out the one that is waited for */
}

static void take_items(int worker) {
    for (long item; (item = atomic_fetch_add(&team.next, 1)) < team.items;) team.job(team.context, item, worker);
}

/* Wait a few microseconds awake, because the next phase of a layer follows at once, then asleep, because the next layer may not. */
static long next_round(long seen) {
    for (int spin = 0; spin < SPINS; spin++, pause_briefly(spin))
        if (atomic_load(&team.round) != seen) return seen + 1;
    pthread_mutex_lock(&team.sleep);
    while (atomic_load(&team.round) == seen) pthread_cond_wait(&team.wake, &team.sleep);
    pthread_mutex_unlock(&team.sleep);
    return seen + 1;
}

struct birth { int worker; long round; };

static struct birth births[MOST_THREADS];

static void *live(void *given) {
    struct birth birth = *(struct birth *)given;
    for (long seen = birth.round;;) {
        seen = next_round(seen);
        if (birth.worker < team.wanted) take_items(birth.worker);
        if (atomic_fetch_sub(&team.working, 1) == 1) {
            pthread_mutex_lock(&team.sleep);
            pthread_cond_signal(&team.done);
            pthread_mutex_unlock(&team.sleep);
        }
    }
    return NULL;
}

/* Signals belong to the threads that Python knows. A machine that gives fewer threads only makes the work slower. */
static void grow_team(int workers) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (team.alive < workers) {
        pthread_t thread;
        births[team.alive] = (struct birth){team.alive + 1, atomic_load(&team.round)};
        if (pthread_create(&thread, NULL, live, &births[team.alive]) != 0) break;
        pthread_detach(thread);
        team.alive++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* Run items 0 … items − 1 on up to `threads` threads and return when all are done. Only who holds team.busy may ask for more than one. */
static void share_out(work *job, void *context, long items, int threads) {
    if (threads > items) threads = (int)items;
    if (threads > 1) grow_team(threads - 1);
    if (threads <= 1 || team.alive == 0) {
        for (long item = 0; item < items; item++) job(context, item, 0);
        return;
    }
    team.job = job, team.context = context, team.items = items, team.wanted = threads;
    atomic_store(&team.next, 0);
    atomic_store(&team.working, team.alive);
    pthread_mutex_lock(&team.sleep);
    atomic_fetch_add(&team.round, 1);
    pthread_cond_broadcast(&team.wake);
    pthread_mutex_unlock(&team.sleep);
    take_items(0);
    for (int spin = 0; spin < SPINS && atomic_load(&team.working) > 0; spin++) pause_briefly(spin);
    pthread_mutex_lock(&team.sleep);
    while (atomic_load(&team.working) > 0) pthread_cond_wait(&team.done, &team.sleep);
    pthread_mutex_unlock(&team.sleep);
}

/* Only the thread that forked lives on in a child, so the child starts with a team of nobody and locks that nobody holds. */
static void forget_team(void) {
    team = (struct team){
        .busy = PTHREAD_MUTEX_INITIALIZER, .sleep = PTHREAD_MUTEX_INITIALIZER,
        .wake = PTHREAD_COND_INITIALIZER, .done = PTHREAD_COND_INITIALIZER,
    };
}
__attribute__((constructor)) static void survive_fork(void) { pthread_atfork(NULL, NULL, forget_team); }
#endif
