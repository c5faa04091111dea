/* The search of search.py, compiled: the same groups, in microseconds, and all that a replay needs to know of each.
 * compiled_search.py builds and calls it. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* KINDS of rows that a size has are given to the compiler: an even number; of the last one it may have 0 rows. So is
 * the number of segment SETS that prices depend on: all or none. */
#define WORDS (KINDS / 2)

/* A cost within this share of another one may be the same, summed up otherwise. */
#define ROUNDING 1e-9

/* The highest bit of the rows of each kind: set in a capacity, all outlast the subtraction of a size that it holds, and
 * of no other one. Rows are below 2^30. */
#define GUARD 0x80000000u
#define GUARDS 0x8000000080000000u

typedef union {
    uint32_t rows[KINDS];
    uint64_t words[WORDS];
} Size;

/* Of an item, or of several. */
typedef struct {
    double load;
    Size size;
} Sum;

/* As the `row` of a core.KnownGrid. Python's bytes begin at a multiple of eight. */
typedef struct {
    Sum sum;
    int32_t place, unused; /* where its metadata lies on the device; negative: nowhere */
} Item;

/* As compiled_search fills it: what packs cost that fit no smaller one. They may run in a larger one that is faster. */
typedef struct {
    Size capacity; /* with guards */
    double fixed;
    double slope[2], beside[2]; /* the second for packs of one or of long segments */
} Budget;

/* As search.FoundGroup. */
typedef struct {
    int32_t begin, end, stretch_begin, stretch_end, smallest, is_settled, is_long;
    Sum sum;
} Group;

/* As compiled_search.Tables. */
typedef struct {
    int32_t rows, budgets, most_exhaustive, step_bits, sets, cover_bits, covers, unused;
    int64_t long_rows;
    double near_enough, least_per_row, least_slope;
    const Budget *budget;                   /* ascending */
    const int32_t *by_step;                 /* the smallest for 0 steps of 1 << step_bits patch rows, for 1, for 2, ...:
                                             * the patch rows of every budget are whole steps */
    const int32_t *set_rows, *set_segments; /* [sets] */
    const double *cover;   /* [covers], see `Prices` */
    const int32_t *splits; /* by the smallest budget that holds all items: whether several packs may cost less */
    const double *settled; /* [2, budgets], see `Prices`; the second where packs may run eager */
    int32_t *starts;       /* the first patch row of every item among those of all, and the end of the last */
    Group *groups;         /* what is found, see search.Searched */
    int32_t *order, *places, *table;
    int32_t stretches, are_placed;
} Tables;

typedef struct {
    int32_t rows, place;
} Key;

/* Of items: patch rows and load. */
typedef struct {
    int64_t rows;
    double load;
} Total;

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

/* Whether it is one segment, or long ones on average, in every one of so many sets. */
static inline int is_long(const Tables *t, const Size *size, int sets) {
    int all = 1;
    for (int s = 0; s < sets; s++) {
        const int64_t rows = size->rows[t->set_rows[s]], segments = size->rows[t->set_segments[s]];
        all &= (segments == 1) | ((segments > 0) & (rows >= t->long_rows * segments));
    }
    return all;
}

static inline double price(const Tables *t, const Size *size, double load) {
    const Budget *budget = smallest(t, size);
    const int kind = is_long(t, size, SETS);
    return budget->fixed + (budget->slope[kind] * load + budget->beside[kind]);
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
    Sum sum = {0.0, {{0}}};
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

/* See `Prices.bound`. */
static double bound(const Tables *t, int64_t rows, double load) {
    if (!rows) return 0.0;
    const int64_t steps = (rows - 1) >> t->cover_bits, last = t->covers - 1;
    return fmax(t->cover[steps < last ? steps : last], rows * t->least_per_row) + load * t->least_slope;
}

/* Dynamic programming over the ends of runs. Runs begin only where the rest may lead below the cost of the groups that
 * were found before.
 *
 * all: the sum of the items, as far as `bound` asks for it.
 * most: that cost.
 * first: for the items that runs may begin with; [count + 1], as all that follow.
 * before, least: for the sums of the items before these, and what they cost at least. What carries in a sum from kind
 * to kind is gone from differences.
 * begin: for where the last run before each of them begins.
 *
 * Returns 0 where nothing costs less.
 */
static int32_t best_runs(
    const Tables *t, const Sum *items, int32_t count, int32_t *group, Total all, double most, Sum *before,
    double *least, double *costs, int32_t *first, int32_t *begin
) {
    int32_t lowest = 0, open = 1; /* the largest budget holds no run that begins below; how many there are */
    Sum sum = {0.0, {{0}}};
    before[0] = sum;
    least[0] = 0.0;
    first[0] = 0;
    most += ROUNDING * fabs(most);
    for (int32_t end = 1; end <= count; end++) {
        add(&sum, &items[end - 1]);
        all.rows -= items[end - 1].size.rows[t->rows];
        all.load -= items[end - 1].load;
        for (; lowest < open; lowest++) {
            const Size run = difference(&sum.size, &before[lowest].size);
            if (holds(largest(t), &run)) break;
        }
        double best = INFINITY;
        for (int32_t k = lowest; k < open; k++) {
            const Size run = difference(&sum.size, &before[k].size);
            costs[k] = least[k] + price(t, &run, sum.load - before[k].load);
            best = costs[k] < best ? costs[k] : best;
        }
        if (best + bound(t, all.rows, all.load) > most) continue; /* also where no run fits */
        int32_t longest = lowest; /* of runs of equal cost */
        while (costs[longest] > best) longest++;
        begin[end] = first[longest];
        before[open] = sum;
        least[open] = best;
        first[open++] = end;
    }
    if (first[open - 1] != count) return 0;
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
 * Sums up items.
 *
 * sum: receives that of all of them, or of so many that the largest budget does not hold them together.
 *
 * Returns 0 where an item exceeds the largest budget, or the patch rows of all an int32.
 */
static int read(const Tables *t, const Item *given, int32_t count, Sum *sum) {
    memset(sum, 0, sizeof(Sum));
    t->starts[0] = 0;
    for (int32_t i = 0; i < count; i++) {
        if (!holds(largest(t), &given[i].sum.size)) return 0;
        if (holds(largest(t), &sum->size)) add(sum, &given[i].sum);
        const int32_t rows = (int32_t)given[i].sum.size.rows[t->rows];
        if (rows > INT32_MAX - t->starts[i]) return 0;
        t->starts[i + 1] = t->starts[i] + rows;
    }
    return 1;
}

/*
 * Groups of items, ordered as their first items come.
 *
 * group: per sorted item a number below count.
 * groups: receives where each one begins and ends in `order`; [count].
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
        next[g] = groups[g].begin = end;
        groups[g].end = end += groups[g].end;
    }
    for (int32_t i = 0; i < count; i++) order[next[number[of_item[i]]]++] = i;
    return found;
}

/* What the items of each group sum up to. For the arguments see `arrange`. */
static void sum_up(
    const Sum *items, const int32_t *group, int32_t count, Group *groups, const int32_t *number, int32_t found
) {
    for (int32_t g = 0; g < found; g++) memset(&groups[g].sum, 0, sizeof(Sum));
    for (int32_t i = 0; i < count; i++) add(&groups[number[group[i]]].sum, &items[i]);
}

/* The cheapest groups of items, into `groups` and `order`. Returns how many there are, -1 where memory is short. */
static int32_t cheapest_groups(const Tables *t, const Item *given, int32_t count) {
    const size_t n = (size_t)count + 1;
    char *memory = malloc(n * (2 * sizeof(Sum) + sizeof(Key) + 2 * sizeof(double) + 5 * sizeof(int32_t)));
    Total all = {0, 0.0};
    if (memory == NULL) return -1;
    Sum *items = (Sum *)memory, *sums = items + n;
    double *least = (double *)(sums + n), *costs = least + n;
    Key *keys = (Key *)(costs + n);
    int32_t *group = (int32_t *)(keys + n), *best = group + n, *number = best + n, *scratch = number + n;

    for (int32_t i = 0; i < count; i++) {
        keys[i].rows = (int32_t)given[i].sum.size.rows[t->rows];
        keys[i].place = i;
    }
    sort(keys, count, t->most_exhaustive);
    for (int32_t i = 0; i < count; i++) {
        items[i] = given[keys[i].place].sum;
        all.rows += keys[i].rows;
        all.load += items[i].load;
    }

    int32_t found = best_fit(t, items, count, best, (Size *)sums);
    double cost = total(t, items, count, best, found, sums);
    found = greedy(t, items, count, group);
    keep_cheaper(total(t, items, count, group, found, sums), group, count, &cost, best);
    if (count <= t->most_exhaustive && cost > t->near_enough * bound(t, all.rows, all.load)) {
        found = best_runs(t, items, count, group, all, cost, sums, least, costs, scratch, scratch + n);
        if (found) keep_cheaper(total(t, items, count, group, found, sums), group, count, &cost, best);
    }
    found = arrange(best, keys, count, t->groups, t->order, number, scratch);
    sum_up(items, best, count, t->groups, number, found);
    free(memory);
    return found;
}

/* All items in one group, into `groups` and `order`. */
static int32_t one_group(const Tables *t, const Sum *sum, int32_t count) {
    t->groups[0].sum = *sum;
    t->groups[0].begin = 0;
    t->groups[0].end = count;
    for (int32_t i = 0; i < count; i++) t->order[i] = i;
    return 1;
}

/* Where each group runs. */
static void settle(const Tables *t, int32_t found, int32_t may_run_eager) {
    for (int32_t g = 0; g < found; g++) {
        Group *group = &t->groups[g];
        group->smallest = (int32_t)(smallest(t, &group->sum.size) - t->budget);
        const int32_t rows = (int32_t)group->sum.size.rows[t->rows];
        group->is_settled = rows >= t->settled[may_run_eager * t->budgets + group->smallest];
        group->is_long = is_long(t, &group->sum.size, t->sets);
    }
}

/* Where the pixel rows of each group lie, as core.Stretches says it, into `table`. */
static void locate(Tables *t, int32_t found) {
    int32_t stretches = 0;
    for (int32_t g = 0; g < found; g++) {
        int32_t row = 0, end = -1; /* of the group, of the batch */
        t->groups[g].stretch_begin = stretches;
        for (int32_t i = t->groups[g].begin; i < t->groups[g].end; i++) {
            const int32_t first = t->starts[t->order[i]];
            if (first != end) t->table[2 * stretches++ + 1] = first;
            end = t->starts[t->order[i] + 1];
            row += end - first;
            t->table[2 * stretches - 2] = row;
        }
        t->groups[g].stretch_end = stretches;
    }
    t->stretches = stretches;
}

/* Where the metadata of each group's items lies, into `places`. Returns whether that of all lies on the device. */
static int32_t place(const Tables *t, const Item *given, int32_t count) {
    int32_t signs = 0;
    for (int32_t i = 0; i < count; i++) signs |= t->places[i] = given[t->order[i]].place;
    return signs >= 0;
}

/*
 * The packs in which items run: one where several cannot cost less, else those of the cheapest groups.
 *
 * given: in the caller's order, at least one.
 *
 * Of the tables, groups, order, places and table receive one pack after another; see above.
 *
 * Returns how many there are, 0 where `read` does, -1 where memory is short.
 */
int32_t find_packs(Tables *t, const Item *given, int32_t count, int32_t may_run_eager) {
    Sum sum;
    if (!read(t, given, count, &sum)) return 0;
    const int fit_one = holds(largest(t), &sum.size) && !t->splits[smallest(t, &sum.size) - t->budget];
    const int32_t found = fit_one ? one_group(t, &sum, count) : cheapest_groups(t, given, count);
    if (found < 0) return found;
    settle(t, found, may_run_eager);
    locate(t, found);
    t->are_placed = place(t, given, count);
    return found;
}
