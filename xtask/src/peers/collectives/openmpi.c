/* One rank of MPI: times MPI_Allreduce (sum, float, in place) as crates/collectives/src/bench.rs does.
 * A call's time is the median over samples, each taken on its slowest rank, from a barrier on; short vectors are timed
 * in batches. Rank 0 prints one JSON object for each length. */
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MOST 1000

static int by_size(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

int main(int argc, char **argv) {
    MPI_Init(&argc, &argv);
    int rank;
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    double budget = atof(argv[1]);
    static double samples[MOST], slowest[MOST];
    for (int a = 2; a < argc; a++) {
        size_t bytes = strtoull(argv[a], NULL, 10), count = bytes / 4;
        int batch = 65536 / (int)(count + 1), n = 0, again = 1;
        batch = batch < 1 ? 1 : batch > 100 ? 100 : batch;
        float *vector = calloc(count, 4);
        if (!vector) MPI_Abort(MPI_COMM_WORLD, 1);
        MPI_Allreduce(MPI_IN_PLACE, vector, count, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
        double began = MPI_Wtime();
        while (again) {
            memset(vector, 0, bytes);
            MPI_Barrier(MPI_COMM_WORLD);
            double start = MPI_Wtime();
            for (int i = 0; i < batch; i++)
                MPI_Allreduce(MPI_IN_PLACE, vector, count, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
            samples[n++] = (MPI_Wtime() - start) / batch;
            int more = n < 5 || (MPI_Wtime() - began < budget && n < MOST);
            MPI_Allreduce(&more, &again, 1, MPI_INT, MPI_MAX, MPI_COMM_WORLD);
        }
        MPI_Allreduce(samples, slowest, n, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD);
        if (rank == 0) {
            qsort(slowest, n, sizeof(double), by_size);
            printf("{\"bytes\": %zu, \"micros\": %.3f}\n", bytes, slowest[n / 2] * 1e6);
            fflush(stdout);
        }
        free(vector);
    }
    MPI_Finalize();
    return 0;
}
