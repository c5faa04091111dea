/* The search of search.py, compiled: the same groups, in microseconds. compiled_search.py builds and calls it. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* KINDS of rows that a size has are given to the compiler: an even number; of the last one it may have 0 rows. So is
 * the number of segment SETS. */
#define WORDS (KINDS / 2)

/* The highest bit of the rows of each kind: set in a capacity, all outlast the subtraction of a size that it holds, and
 * of no other one. Rows are below 2^30. */
#define GUARD 0x80000000u
#define GUARDS 0x8000000080000000u

typedef union {
    uint32_t rows[KINDS];
    uint64_t words[WORDS];
} Size;

/* An item, or the sum of several, as core.sum_format says it. Python's bytes begin at a multiple of eight. */
typedef struct {
    Size size;
    double load;
} Sum;

/* As compiled_search fills it: what packs cost that fit no smaller one. They may run in a larger one that is faster. */
typedef struct {
    Size capacity; /* with guards */
    double fixed;
    double slope[2], beside[2]; /* the second for packs of one or of long segments */
} Budget;

/* A group that was found, as CompiledSearch reads it. */
typedef struct {
    Sum sum;
    int32_t end, stretch_end; /* where its items end in `order`, and its stretches in `table` */
    int32_t smallest;         /* the smallest budget that holds it */
} Group;

/* As compiled_search.Tables. */
typedef struct {
    int32_t rows, budgets, most_exhaustive, step_bits;
    int64_t long_rows;
    double near_enough, least_per_row, least_slope;
    const Budget *budget;                   /* ascending */
    const int32_t *by_step;                 /* the smallest for 0 steps of 1 << step_bits patch rows, for 1, for 2, ...:
                                             * the patch rows of every budget are whole steps */
    const int32_t *set_rows, *set_segments; /* [SETS] */
    Group *groups; /* what is found, see `cheapest_groups` */
    int32_t *order, *table;
    int64_t rows_of_all;
} Tables;

typedef struct {
    int32_t rows, place;
} Key;

static inline void add(Sum *sum, const Sum *item) {
    for (int w = 0; w < WORDS; w++) sum->size.words[w] += item->size.words[w];
    sum->load += item->load;
}

static inline Size difference(const Size *size, const Size *part) {
    Size left;
    for (int w = 0; w < WORDS; w++) left.words[w] = size->words[w] - part->words[w];
    return left;
}

static inline int holds(const Size *capacity, const Size *size) {
    uint64_t left = GUARDS;
    for (int w = 0; w < WORDS; w++) left &= capacity->words[w] - size->words[w];
    return left == GUARDS;
}

static const Size *largest(const Tables *t) { return &t->budget[t->budgets - 1].capacity; }

/* Of a pack that the largest budget holds. No branches, here and in `price`, but one that is hardly ever taken: the
 * search asks this of thousands of packs, and what it decides of each could not be predicted. */
static inline const Budget *smallest(const Tables *t, const Size *size) {
    const uint32_t steps = (size->rows[t->rows] + (1u << t->step_bits) - 1) >> t->step_bits;
    const Budget *budget = t->budget + t->by_step[steps];
    while (!holds(&budget->capacity, size)) budget++;
    return budget;
}

static inline double price(const Tables *t, const Size *size, double load) {
    const Budget *budget = smallest(t, size);
    int is_long = 1;
    for (int s = 0; s < SETS; s++) {
        const int64_t rows = size->rows[t->set_rows[s]], segments = size->rows[t->set_segments[s]];
        is_long &= (segments == 1) | ((segments > 0) & (rows >= t->long_rows * segments));
    }
    return budget->fixed + (budget->slope[is_long] * load + budget->beside[is_long]);
}

/* Whether less room is left here than there; the first kind decides first. */
static int is_tighter(const Size *here, const Size *there) {
    for (int k = 0; k < KINDS; k++)
        if (here->rows[k] != there->rows[k]) return here->rows[k] < there->rows[k];
    return 0;
}

/* Each of these numbers the groups from 0, writes that of every item, and returns how many there are. */

static int32_t best_fit(const Tables *t, const Sum *items, int32_t count, int32_t *group, Size *room) {
    int32_t groups = 0;
    for (int32_t i = 0; i < count; i++) {
        int32_t best = groups;
        Size least = difference(largest(t), &items[i].size);
        for (int32_t g = 0; g < groups; g++) {
            if (!holds(&room[g], &items[i].size)) continue;
            const Size left = difference(&room[g], &items[i].size);
            if (best < groups && !is_tighter(&left, &least)) continue;
            best = g;
            least = left;
        }
        groups += best == groups;
        room[best] = least;
        group[i] = best;
    }
    return groups;
}

static int32_t greedy(const Tables *t, const Sum *items, int32_t count, int32_t *group) {
    int32_t groups = 0;
    Sum sum = {{{0}}, 0.0};
    for (int32_t i = count - 1; i >= 0; i--) {
        add(&sum, &items[i]);
        if (!groups || !holds(largest(t), &sum.size)) {
            groups++;
            sum = items[i];
        }
        group[i] = groups - 1;
    }
    return groups;
}

/* Dynamic programming over the ends of runs.
 *
 * before: for the sums of the items before each one, and of all; [count + 1]. What carries there from kind to kind is
 * gone from their differences.
 */
static int32_t best_runs(
    const Tables *t, const Sum *items, int32_t count, int32_t *group, Sum *before, double *least, double *costs,
    int32_t *begin
) {
    int32_t lowest = 0; /* that a run may begin with: the largest budget holds no longer one */
    memset(before, 0, sizeof(Sum));
    least[0] = 0.0;
    for (int32_t end = 1; end <= count; end++) {
        before[end] = before[end - 1];
        add(&before[end], &items[end - 1]);
        Size run = difference(&before[end].size, &before[lowest].size);
        while (!holds(largest(t), &run)) run = difference(&before[end].size, &before[++lowest].size);
        double best = INFINITY;
        for (int32_t first = lowest; first < end; first++) {
            run = difference(&before[end].size, &before[first].size);
            costs[first] = least[first] + price(t, &run, before[end].load - before[first].load);
            best = costs[first] < best ? costs[first] : best;
        }
        least[end] = best;
        begin[end] = lowest; /* of equal ones the longest run */
        while (costs[begin[end]] > best) begin[end]++;
    }
    int32_t groups = 0;
    for (int32_t end = count; end > 0; end = begin[end], groups++)
        for (int32_t i = begin[end]; i < end; i++) group[i] = groups;
    return groups;
}

static double total(
    const Tables *t, const Sum *items, int32_t count, const int32_t *group, int32_t groups, Sum *sums
) {
    memset(sums, 0, sizeof(Sum) * groups);
    for (int32_t i = 0; i < count; i++) add(&sums[group[i]], &items[i]);
    double cost = 0.0;
    for (int32_t g = 0; g < groups; g++) cost += price(t, &sums[g].size, sums[g].load);
    return cost;
}

static double bound(const Tables *t, const Sum *items, int32_t count) {
    double rows = 0.0, load = 0.0;
    for (int32_t i = 0; i < count; i++) {
        rows += items[i].size.rows[t->rows];
        load += items[i].load;
    }
    return rows * t->least_per_row + load * t->least_slope;
}

static int by_rows_then_place(const void *a, const void *b) {
    const Key *x = a, *y = b;
    if (x->rows != y->rows) return x->rows > y->rows ? -1 : 1;
    return x->place < y->place ? -1 : 1;
}

/* The largest first, of equal ones the first. Up to some hundreds are inserted one by one, in less than half the
 * time. */
static void sort(Key *keys, int32_t count, int32_t few) {
    if (count > few) {
        qsort(keys, count, sizeof(Key), by_rows_then_place);
        return;
    }
    for (int32_t i = 1; i < count; i++) {
        const Key key = keys[i];
        int32_t at = i;
        for (; at > 0 && keys[at - 1].rows < key.rows; at--) keys[at] = keys[at - 1];
        keys[at] = key;
    }
}

/* Of equal costs the one that was found first is kept. */
static void keep_cheaper(double cost, const int32_t *group, int32_t count, double *least, int32_t *best) {
    if (cost >= *least) return;
    *least = cost;
    memcpy(best, group, sizeof(int32_t) * count);
}

/*
 * Sorts items, see `sort`.
 *
 * given: in the caller's order.
 * items: receives them sorted.
 * starts: receives the first patch row of every item among those of all, and the end of the last.
 *
 * Returns 0 where an item exceeds the largest budget.
 */
static int read(const Tables *t, const Sum *given, int32_t count, Key *keys, Sum *items, int32_t *starts) {
    starts[0] = 0;
    for (int32_t i = 0; i < count; i++) {
        if (!holds(largest(t), &given[i].size)) return 0;
        keys[i].rows = (int32_t)given[i].size.rows[t->rows];
        keys[i].place = i;
        starts[i + 1] = starts[i] + keys[i].rows;
    }
    sort(keys, count, t->most_exhaustive);
    for (int32_t i = 0; i < count; i++) items[i] = given[keys[i].place];
    return 1;
}

/*
 * Groups of items, ordered as their first items come.
 *
 * group: per sorted item a number below count.
 * groups: receives where each one ends in `order`; [count].
 * order: receives the items of the first group, ascending, then those of the second, ...; [count].
 * number: receives which one comes of each number in `group`; [count].
 * scratch: [2, count].
 *
 * Returns how many groups there are.
 */
static int32_t arrange(
    const int32_t *group, const Key *keys, int32_t count, Group *groups, int32_t *order, int32_t *number,
    int32_t *scratch
) {
    int32_t *of_item = scratch, *next = scratch + count, found = 0, end = 0;
    for (int32_t i = 0; i < count; i++) {
        of_item[keys[i].place] = group[i];
        number[i] = -1;
        groups[i].end = 0;
    }
    for (int32_t i = 0; i < count; i++) {
        if (number[of_item[i]] < 0) number[of_item[i]] = found++;
        groups[number[of_item[i]]].end++;
    }
    for (int32_t g = 0; g < found; g++) {
        next[g] = end;
        groups[g].end = end += groups[g].end;
    }
    for (int32_t i = 0; i < count; i++) order[next[number[of_item[i]]]++] = i;
    return found;
}

/* What the items of each group sum up to, and the smallest budget that holds them. For the arguments see `arrange`. */
static void sum_up(
    const Tables *t, const Sum *items, const int32_t *group, int32_t count, Group *groups, const int32_t *number,
    int32_t found
) {
    for (int32_t g = 0; g < found; g++) memset(&groups[g].sum, 0, sizeof(Sum));
    for (int32_t i = 0; i < count; i++) add(&groups[number[group[i]]].sum, &items[i]);
    for (int32_t g = 0; g < found; g++)
        groups[g].smallest = (int32_t)(smallest(t, &groups[g].sum.size) - t->budget);
}

/*
 * Where the pixel rows of groups lie, as core.Stretches says it.
 *
 * starts: see `read`.
 * order: see `arrange`.
 * groups: receive where the stretches of each end in `table`.
 * table: receives the stretches of all groups; [count, 2].
 */
static void locate(const int32_t *starts, const int32_t *order, Group *groups, int32_t found, int32_t *table) {
    int32_t stretches = 0;
    for (int32_t g = 0, i = 0; g < found; g++) {
        int32_t row = 0, end = -1; /* of the group, of the batch */
        for (; i < groups[g].end; i++) {
            const int32_t first = starts[order[i]];
            if (first != end) table[2 * stretches++ + 1] = first;
            end = starts[order[i] + 1];
            row += end - first;
            table[2 * stretches - 2] = row;
        }
        groups[g].stretch_end = stretches;
    }
}

/*
 * The cheapest groups of items.
 *
 * given: see `read`.
 *
 * Of the tables, groups, order and table receive what `arrange`, `sum_up` and `locate` say, and rows_of_all the patch
 * rows of all items.
 *
 * Returns how many groups there are, 0 where an item exceeds the largest budget, -1 where memory is short.
 */
int32_t cheapest_groups(Tables *t, const Sum *given, int32_t count) {
    const size_t n = (size_t)count + 1;
    char *memory = malloc(n * (2 * sizeof(Sum) + sizeof(Key) + 2 * sizeof(double) + 6 * sizeof(int32_t)));
    if (memory == NULL) return -1;
    Sum *items = (Sum *)memory, *sums = items + n;
    double *least = (double *)(sums + n), *costs = least + n;
    Key *keys = (Key *)(costs + n);
    int32_t *starts = (int32_t *)(keys + n), *group = starts + n, *best = group + n, *number = best + n;
    int32_t *scratch = number + n;

    int32_t found = 0;
    if (read(t, given, count, keys, items, starts)) {
        found = best_fit(t, items, count, best, (Size *)sums);
        double cost = total(t, items, count, best, found, sums);
        found = greedy(t, items, count, group);
        keep_cheaper(total(t, items, count, group, found, sums), group, count, &cost, best);
        if (count <= t->most_exhaustive && cost > t->near_enough * bound(t, items, count)) {
            found = best_runs(t, items, count, group, sums, least, costs, scratch);
            keep_cheaper(total(t, items, count, group, found, sums), group, count, &cost, best);
        }
        found = arrange(best, keys, count, t->groups, t->order, number, scratch);
        sum_up(t, items, best, count, t->groups, number, found);
        locate(starts, t->order, t->groups, found, t->table);
        t->rows_of_all = starts[count];
    }
    free(memory);
    return found;
}
