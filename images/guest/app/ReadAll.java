// Part of the role "app": compiled when the image is built, run in the guest. See roles/app.sh.
import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.channels.FileChannel;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.List;
import java.util.jar.JarFile;

/**
 * Does to the disk what an application server does when it starts: opens every archive of a class path, looks through its
 * directory, and reads all of it. It inflates and defines no class, because that is work for the processor, not the disk.
 *
 * <p>Argument: a file that names the archives, one a line. Prints how many files, entries and bytes there were.
 */
final class ReadAll {
    public static void main(String[] arguments) throws IOException {
        List<String> names = Files.readAllLines(Path.of(arguments[0]));
        ByteBuffer buffer = ByteBuffer.allocateDirect(1 << 20);
        long bytes = 0;
        long entries = 0;
        long sum = 0;
        for (String name : names) {
            if (name.endsWith(".jar")) {
                try (JarFile jar = new JarFile(name)) {
                    entries += jar.size();
                }
            }
            try (FileChannel file = FileChannel.open(Path.of(name))) {
                while (file.read(buffer) >= 0) {
                    // A byte of each page: what was read is used.
                    for (int at = 0; at < buffer.position(); at += 4096) {
                        sum += buffer.get(at);
                    }
                    bytes += buffer.position();
                    buffer.clear();
                }
            }
        }
        if (bytes == 0) {
            throw new IOException(arguments[0] + " names nothing that could be read");
        }
        System.out.println(names.size() + " files, " + entries + " entries, " + bytes + " bytes, sum " + sum);
    }
}
